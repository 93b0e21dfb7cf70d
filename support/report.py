"""Report: what a run says and writes about itself, and the state that it goes on with.

One line per step and per evaluation on the screen, every number in metrics.jsonl, the closing words in summary.json.
"""
import re
import time
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from support.errors import NotFinite, UserError
from support.memory import size_text
from support.page import evaluations, records
from support.used_memory import used_memory

# nats per token between the log-probs of sampler and trainer that rounding explains
SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
STATE = {"step": 0, "before": {}, "teacher": None, "best": None, "best_step": 0, "after": {}, "seconds": 0.0,
         "skipped": 0, "skipped_in_a_row": 0, "empty": 0, "sampler_gap": 0.0, "tokens": 0, "phases": {}}


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`. On a GPU the phases end where the host reads a result."""

    def __init__(self):
        self.started, self.seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Report:
    """Keeps the state of a run and tells about it."""

    def __init__(self, run, folder):
        self.run, self.folder, self.clock = run, folder, Clock()
        self.track = trackers(run.cfg, folder)
        self.state: dict = {}

    def resume(self, optimizer) -> dict | None:
        """The state of the newest checkpoint, loaded into the models; None at the very start."""
        found = self.folder.resume(self.run.student, optimizer, self.run.also_saved, like=STATE)
        if found:
            print(f"resume  {self.folder.path} from step {found['step']}")
            self.state = found
        self.seconds_before = self.state.get("seconds", 0.0)
        return found

    def begin(self, before: dict, samples: list[dict], teacher: dict | None) -> dict:
        """What stands before the first step: how good student and teacher are."""
        self.folder.write_samples(0, samples)
        print(test_line("before ", before))
        if teacher:
            print(test_line("teacher", teacher))
        self.state = {**STATE, "phases": {}, "before": before, "teacher": teacher, "after": before,
                      "best": before.get(judged_by(before))}
        self.folder.log({"step": 0, "eval": before, "eval_teacher": teacher})
        tokens = sum(round(m["mean_length"] * m["problems"] * self.run.cfg.eval_k) for m in (before, teacher) if m)
        note_time(self.state, {"tokens": tokens}, {"evaluation": time.perf_counter() - self.clock.started})
        return self.state

    def step(self, step: int, record: dict, clock: Clock) -> None:
        """Writes a step's record; says what cannot go on or should not go unseen."""
        state, cfg = self.state, self.run.cfg
        record["seconds"] = time.perf_counter() - clock.started
        record |= {f"{part}_seconds": seconds for part, seconds in clock.seconds.items()}
        record["reward"] = self.run.batch.reward_B.mean().item()
        note_time(state, record, clock.seconds)
        self.folder.log({"step": step, **record})
        for log in self.track:
            log(record, step)
        if not cfg.quiet:
            tqdm.write(step_line(step, cfg, record))
        state["tokens"] += record["tokens"] * record["on_policy"]
        state["skipped"] += record["skipped"]
        state["skipped_in_a_row"] = (state["skipped_in_a_row"] + 1) * record["skipped"]
        state["empty"] += record["empty"]
        if state["skipped_in_a_row"] >= 5:
            raise NotFinite("the student's loss or gradient was not finite in 5 steps in a row, although the teacher's "
                            "numbers were")
        gap, most = record["sampler_gap"], SAMPLER_GAP.get(self.run.student.compute_dtype, 1e-3)
        if gap > most >= state["sampler_gap"]:
            tqdm.write(f"warning: log-probs of sampler and trainer are {gap:.1e} nats per token apart, rounding "
                       f"explains {most:g}: is the sampler changed, or a kernel wrong? The run is not on-policy")
        if gap > state["sampler_gap"]:
            state["sampler_gap"] = gap

    def evaluation(self, step: int, metrics: dict, samples: list[dict]) -> None:
        """Prints and records an evaluation of the student, and remembers whether it is the best so far."""
        state = self.state
        note_time(state, {"tokens": round(metrics["mean_length"] * len(samples))}, {"evaluation": metrics["seconds"]})
        self.folder.write_samples(step, samples)
        self.folder.log({"step": step, "eval": metrics})
        for log in self.track:
            log({f"eval/{key}": value for key, value in metrics.items()}, step)
        if better(metrics, state["best"]):
            state["best"], state["best_step"] = metrics.get(judged_by(metrics)), step
        state["after"] = metrics
        self.folder.write_page()
        tqdm.write(test_line("eval   ", metrics))
        if not self.run.cfg.quiet:
            tqdm.write(example(self.run, samples, step))

    def save(self, step: int, optimizer) -> None:
        self.state["seconds"] = self.seconds_before + time.perf_counter() - self.clock.started
        check_student(self.run)
        self.folder.save(step, self.run.student, self.run.tokenizer, optimizer, self.state,
                         best=self.state["best_step"] == step, also=self.run.also_saved)

    def finish(self) -> None:
        state, run = self.state, self.run
        key = judged_by(state["after"])
        self.folder.write_summary({
            **{name: state[name] for name in ("before", "after", "teacher", "seconds", "tokens", "skipped", "empty",
                                              "sampler_gap")},
            "steps": state["step"], "best": {"step": state["best_step"], **({key: state["best"]} if key else {})},
            "recipe": run.cfg.recipe, "timings": timings(state), "planned_memory": run.planned_memory,
            "peak_memory": used_memory(run.student.device, run.memory_before)})
        self.folder.write_page()
        print(self.folder.summary(lambda summary: closing_line(self.folder, summary)))


@torch.no_grad()
def check_student(run) -> None:
    """A checkpoint of a student whose numbers went bad would take the place of the last good one."""
    hidden = run.student(torch.tensor([run.prompts[0]], device=run.student.device))
    if not torch.isfinite(run.student.logits(hidden[:, -1:])).all():
        raise NotFinite("the student's logits are not finite")


# Lines

def step_line(step: int, cfg, m: dict) -> str:
    """The one line of a step; undefined numbers are left out."""
    shown = [("loss", "loss", "7.4f"), ("kl", "reverse_kl", "6.3f"), ("right", "reward", "4.0%"),
             ("length", "mean_length", "5.1f"), ("cut", "truncation_rate", "3.0%"),
             ("overlap", "overlap_ratio", "4.2f"), ("entropy", "student_entropy", "5.2f"),
             ("grad", "grad_norm", "6.3f"), ("s", "seconds", "5.2f")]
    parts = [f"{label} {m[key]:{form}}" for label, key, form in shown if not np.isnan(m.get(key, np.nan))]
    skipped = "  SKIPPED: loss or gradient not finite" if m["skipped"] else ""
    return f"step {step:>{len(str(cfg.steps))}}/{cfg.steps}  {'  '.join(parts)}{skipped}"


def test_line(label: str, metrics: dict) -> str:
    length, cut = metrics["mean_length"], metrics["truncation_rate"]
    return f"{label}  held-out {headline(metrics)}length {length:.1f}  cut {cut:.0%}"


def example(run, samples: list[dict], step: int) -> str:
    """One held-out answer, another one each time."""
    sample = samples[(step * 7919) % len(samples)]
    asked = run.held_out[sample["problem"]].prompt
    asked = asked if isinstance(asked, str) else asked[-1]["content"]
    verdict = {True: "  (right)", False: "  (wrong)", None: ""}[sample["correct"]]
    return f"        e.g. {asked[-200:]!r} -> {sample['text'][:400]!r}{verdict}"


def curve_line(evals: list[tuple[int, dict]]) -> str:
    """`24.6% ▁▄▇██ 99.0% at steps 0 to 120`: a bar per evaluation, as high as it stands between lowest and highest."""
    key = judged_by(evals[0][1]) if evals else None
    values = [metrics[key] for _, metrics in evals if metrics.get(key) is not None] if key else []
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in values)
    return (f"        {figure(key, evals[0][1])} {bars} {figure(key, evals[-1][1])} at steps {evals[0][0]} to "
            f"{evals[-1][0]}\n")


def closing_line(folder, summary: dict) -> str:
    shares = "  ".join(f"{phase} {t['share']:.0%}"
                       + (f" ({t['tokens_per_second']:,.0f} tokens/s)" if t["tokens_per_second"] else "")
                       for phase, t in summary["timings"].items())
    return (f"done    held-out {change(summary['before'], summary['after'], summary['teacher'])} in "
            f"{summary['steps']} steps, {summary['seconds']:.0f} s\n{curve_line(evaluations(records(folder.metrics)))}"
            f"        {shares}, peak memory {size_text(summary['peak_memory'])}\n"
            f"        sampler and trainer at most {summary['sampler_gap']:.1e} nats per token apart\n"
            f"        in {folder.path}: the trained model last/, the best one best/, metrics.jsonl, samples/, "
            f"summary.json, report.html")


# Time

def note_time(state: dict, record: dict, seconds: dict[str, float]) -> None:
    """Adds tokens per second of every phase to the record, and seconds and tokens to the run's sums."""
    for phase, spent in seconds.items():
        record[f"{phase}_tokens_per_second"] = record["tokens"] / max(spent, 1e-9)
        before = state["phases"].get(phase, [0.0, 0])
        state["phases"][phase] = [before[0] + spent, before[1] + record["tokens"]]


def timings(state: dict) -> dict:
    """phase -> seconds, its share of the run, tokens per second. `other`: loading excepted, whatever is left."""
    phases = dict(state["phases"])
    phases["other"] = [max(0.0, state["seconds"] - sum(spent for spent, _ in phases.values())), 0]
    whole = sum(spent for spent, _ in phases.values())
    return {phase: {"seconds": spent, "share": spent / max(whole, 1e-9),
                    "tokens_per_second": tokens / max(spent, 1e-9)} for phase, (spent, tokens) in phases.items()}


# What an evaluation is judged by: how it is printed, and which checkpoint is the best

def judged_by(metrics: dict) -> str | None:
    """The figure that decides: accuracy, else the distance to the teacher, else none."""
    return next((key for key in metrics if re.fullmatch(r"avg@\d+|reverse_kl", key)), None)


def better(metrics: dict, best: float | None) -> bool:
    """Is this evaluation better than an earlier one whose figure was `best`? Where none decides, the later one is."""
    key = judged_by(metrics)
    value = metrics.get(key)
    if key is None or value is None or best is None:
        return key is None or value is not None
    return value < best if key == "reverse_kl" else value > best


def headline(metrics: dict) -> str:
    """The first figures of an evaluation's line."""
    key = judged_by(metrics)
    if key == "reverse_kl":
        return "".join(f"{name} {figure(name, metrics)}  " for name in ("reverse_kl", "forward_kl"))
    low, high = metrics[f"{key}_ci"] if key else (0, 0)
    others = key and key.replace("avg", "pass")
    return f"{key} {metrics[key]:.1%} [{low:.1%}, {high:.1%}]  {others} {metrics[others]:.1%}  " if key else ""


def change(before: dict, after: dict, teacher: dict | None) -> str:
    """`avg@8 24.6% -> 99.0% (teacher 99.7%)`"""
    key = judged_by(before) or "mean_length"
    of_teacher = f" (teacher {figure(key, teacher)})" if teacher and key in teacher else ""
    return f"{key} {figure(key, before)} -> {figure(key, after)}{of_teacher}"


def figure(key: str, metrics: dict) -> str:
    form = {"reverse_kl": ".4f", "forward_kl": ".4f", "mean_length": ".1f"}.get(key, ".1%")
    return "-" if metrics[key] is None else f"{metrics[key]:{form}}"


# Optional services

def without_folders(value):
    """A path of this machine, or the paths in tag=path,tag=path, as its last part: a public log needs no more."""
    return re.sub(r"(^|[=,])[/~.][^=,]*/", r"\1", value) if isinstance(value, str) else value


def check_trackers(cfg) -> None:
    import importlib.util
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name}: that package is not installed; pip install {name}, or leave the flag out")


def trackers(cfg, folder) -> list:
    """Functions (record, step) for the optional services, imported only when asked for."""
    found = []
    if cfg.wandb:
        import wandb
        run = wandb.init(project="opd", name=folder.path.name, id=folder.path.name, resume="allow",
                         config={key: without_folders(value) for key, value in asdict(cfg).items()})
        found.append(lambda record, step: run.log(record, step=step))
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder.path / "tensorboard")
        found.append(lambda record, step: [board.add_scalar(k, v, step) for k, v in record.items()
                                           if isinstance(v, (int, float))])
    return found
