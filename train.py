"""On-policy distillation: the student writes, the teacher scores every token, the student moves.

    python train.py                                   # the toy pair in toy/: about a minute on two CPU cores
    python train.py --recipe gkd --lr 1e-4            # another method, another flag
    python train.py --help                            # every flag and what it means

    repeat:  problems -> rollout (student) -> scores (teacher) -> advantage, weight -> loss -> one optimizer
             step

A recipe is a row of overrides (config.py), and any flag after it overrides the recipe. The run lands in
runs/NAME; the same command again goes on where it was stopped. Nothing imports this file.
"""
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
from checkpoint import RunFolder, run_path, started, trainable
from config import NOT_THE_RUN, Config, check, parse, run_name
from eval import better, change, evaluate, headline, judged_by, metrics_of
from memory import give_back_freed_memory, size_text, used_memory
from prepare import Setup, parse_teachers, set_up
from report import check_tokenizers, report, self_check
from step import Clock, teacher_responses, train_step, warm_up
from support.errors import NotFinite, UserError, one_line
from support.held_out import distance
from support.plan import chosen
from tokenizer import Tokenizer


# nats per token between the log-probs of sampler and trainer that rounding explains
SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}

# what a run counts, as it begins
START = {"step": 0, "best_step": 0, "seconds": 0.0, "tokens": 0, "phases": {}, "skipped": 0, "skipped_in_a_row": 0,
         "empty": 0, "sampler_gap": 0.0}


def test_teachers(cfg: Config, run: Setup) -> dict | None:
    """Held-out metrics of the teacher; of several, each on the problems routed to it (None: no problem names
    one)."""
    if len(run.teachers) == 1:
        return test(cfg, run, run.teachers[0], "teacher", run.bridges[0])[0]
    samples: list[dict] = []
    for tag, model, bridge in zip(parse_teachers(cfg), run.teachers, run.bridges):
        part = replace(run, held_out=[p for p in run.held_out if p.fields.get(cfg.route) == tag])
        if part.held_out:
            samples += test(cfg, part, model, f"teacher {tag}", bridge)[1]
    return metrics_of(samples, cfg.eval_k, cfg.verifier) if samples else None


def step_line(step: int, cfg: Config, m: dict) -> str:
    """The one line of a step; undefined numbers are left out."""
    shown = [("loss", "loss", "7.4f"), ("kl", "reverse_kl", "6.3f"), ("right", "reward", "4.0%"),
             ("length", "mean_length", "5.1f"), ("cut", "truncation_rate", "3.0%"),
             ("overlap", "overlap_ratio", "4.2f"), ("entropy", "student_entropy", "5.2f"),
             ("grad", "grad_norm", "6.3f"), ("s", "seconds", "5.2f")]
    parts = [f"{label} {m[key]:{form}}" for label, key, form in shown if not np.isnan(m.get(key, np.nan))]
    skipped = "  SKIPPED: loss or gradient not finite" if m["skipped"] else ""
    return f"step {step:>{len(str(cfg.steps))}}/{cfg.steps}  {'  '.join(parts)}{skipped}"


@contextmanager
def graceful_stop():
    """Yields a list that SIGINT or SIGTERM fills: the step is finished first. A second signal acts at
    once."""
    caught = []
    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # not print: a handler that interrupts a print would be refused as a reentrant call, and end the run
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)\n"
        if parallel.rank() == 0:
            os.write(2, text.encode())
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def without_folders(value):
    """A path of this machine, or the paths in tag=path,tag=path, as its last part: a public log needs no more."""
    return re.sub(r"(^|[=,])[/~.][^=,]*/", r"\1", value) if isinstance(value, str) else value


def trackers(cfg: Config, folder: RunFolder) -> list:
    """Functions (record, step) for the optional services, imported only when asked for."""
    found = []
    if parallel.rank():
        return found
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


def test(cfg: Config, run: Setup, model, label: str, bridge=None) -> tuple[dict, list[dict]]:
    """Held-out metrics and answers of a model (a teacher with another tokenizer has a bridge). The same seed
    every time, so that curves share their noise."""
    return evaluate(model, bridge.teacher if bridge else run.tokenizer, run.held_out, k=cfg.eval_k,
                    temperature=cfg.eval_temperature,
                    max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens, seed=10**9 + cfg.seed,
                    verifier=cfg.verifier, slots=cfg.slots, progress=label,
                    variables=run.teacher_variables if bridge else run.variables)


def test_student(cfg: Config, run: Setup, label: str) -> tuple[dict, list[dict]]:
    """test() of the student; where it cannot be graded, how far it is from its teacher as well."""
    metrics, samples = test(cfg, run, run.actor, label)
    if run.compared:
        metrics |= distance(samples, run.student, run.compared, vocab_size=run.vocab_size, chunk_rows=run.chunk_rows,
                            temperature=cfg.eval_temperature or 1.0, max_tokens=cfg.micro_batch_tokens)
    return metrics, samples


def test_line(label: str, metrics: dict) -> str:
    return (f"{label}  held-out {headline(metrics)}length {metrics['mean_length']:.1f}  "
            f"cut {metrics['truncation_rate']:.0%}")


def example(run: Setup, samples: list[dict], step: int) -> str:
    """One held-out answer, another one each time."""
    sample = samples[(step * 7919) % len(samples)]
    asked = run.held_out[sample["problem"]].prompt
    asked = asked if isinstance(asked, str) else asked[-1]["content"]
    verdict = {True: "  (right)", False: "  (wrong)", None: ""}[sample["correct"]]
    return f"        e.g. {asked[-200:]!r} -> {sample['text'][:400]!r}{verdict}"


def begin(cfg: Config, folder: RunFolder, run: Setup) -> dict:
    """What stands before the first step: checks on request, and how good student and teacher are."""
    if cfg.self_check:
        self_check(cfg, run)
    check_tokenizers(cfg, run)
    begun = time.perf_counter()
    before, samples = test_student(cfg, run, "student before")
    folder.write_samples(0, samples)
    print(test_line("before ", before))
    teacher = test_teachers(cfg, run) if run.teachers and cfg.eval_teacher and cfg.teacher != "self" else None
    if teacher:
        print(test_line("teacher", teacher))
    state = {**START, "phases": {}, "before": before, "teacher": teacher, "best": before.get(judged_by(before)),
             "after": before}
    folder.log({"step": 0, "eval": before, "eval_teacher": teacher})
    tokens = sum(round(m["mean_length"] * m["problems"] * cfg.eval_k) for m in (before, teacher) if m)
    note_time(state, {"tokens": tokens}, {"evaluation": time.perf_counter() - begun})
    return state


def train(cfg: Config, folder: RunFolder, run: Setup, memory_before: int = 0) -> int:
    """The run, from wherever the folder says it stands. Returns the exit status: 0, or 128 + signal when
    stopped."""
    optimizer = torch.optim.AdamW([p for _, p in trainable(run.student)], lr=cfg.lr, betas=(0.9, 0.999),
                                  weight_decay=cfg.weight_decay, fused=run.student.device.type in ("cuda", "cpu"))
    started, track = time.perf_counter(), trackers(cfg, folder)
    state = folder.resume(run.student, optimizer, run.average, like={**START, "before": {}, "after": {}})
    if state:
        print(f"resume  {folder.path} from step {state['step']}")
    if cfg.compile:
        begun = time.perf_counter()
        warm_up(cfg, run)
        print(f"compile took {time.perf_counter() - begun:.0f} s")
    written = teacher_responses(cfg, run, folder)
    if state is None:
        state = begin(cfg, folder, run)
        # the untouched student is the first candidate for best/
        folder.save(0, run.student, run.tokenizer, optimizer, state, best=True, average=run.average)
    seconds_before = state["seconds"]

    with graceful_stop() as stopped, tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=None) as bar:
        while state["step"] < cfg.steps:
            clock = Clock()
            with clock("seconds"):
                record = train_step(cfg, run, optimizer, state["step"], written, clock)
            step = state["step"] = state["step"] + 1
            record |= {"seconds": clock.seconds.pop("seconds"), **{f"{k}_seconds": v for k, v in clock.seconds.items()}}
            note_time(state, record, clock.seconds)
            folder.log({"step": step, **record})
            for log in track:
                log(record, step)
            tqdm.write(step_line(step, cfg, record))
            bar.update()
            note_step(run, state, record)
            due = cfg.eval_every and step % cfg.eval_every == 0 or step == cfg.steps
            if due:
                evaluate_and_note(cfg, run, folder, state, track)
            # asked once: a signal between two looks would leave without saving
            stop = parallel.largest(stopped[0] if stopped else 0)
            if due or stop or step % cfg.save_every == 0:
                state["seconds"] = seconds_before + time.perf_counter() - started
                check_student(run)
                folder.save(step, run.student, run.tokenizer, optimizer, state, best=state.get("best_step") == step,
                            average=run.average)
            if stop and step < cfg.steps:
                tqdm.write(f"stopped after step {step}; the same command goes on from there")
                return 128 + stop
    finish(cfg, folder, state, run, memory_before)
    return 0


def note_step(run: Setup, state: dict, record: dict) -> None:
    """Adds a step's counts to the run's, and says what cannot go on or should not go unseen."""
    state["tokens"] += record["tokens"] * record["on_policy"]
    state["skipped"] += record["skipped"]
    state["skipped_in_a_row"] = (state["skipped_in_a_row"] + 1) * record["skipped"]
    state["empty"] += record["empty"]
    if state["skipped_in_a_row"] >= 5:
        raise NotFinite("the student's loss or gradient was not finite in 5 steps in a row, although the teacher's "
                        "numbers were")
    gap, most = record["sampler_gap"], SAMPLER_GAP[run.student.compute_dtype]
    if gap > most >= state["sampler_gap"]:
        tqdm.write(f"warning: log-probs of sampler and trainer are {gap:.1e} nats per token apart, rounding explains "
                   f"{most:g}: is the sampler changed, or a kernel wrong? The run is not on-policy")
    if gap > state["sampler_gap"]:
        state["sampler_gap"] = gap


@torch.no_grad()
def check_student(run: Setup) -> None:
    """A checkpoint of a student whose numbers went bad would take the place of the last good one."""
    hidden = run.student(torch.tensor([run.prompts[0]], device=run.student.device))
    if not torch.isfinite(run.student.logits(hidden[:, -1:])).all():
        raise NotFinite("the student's logits are not finite")


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


def evaluate_and_note(cfg: Config, run: Setup, folder: RunFolder, state: dict, track: list) -> None:
    """Evaluate the student as it is now, print and record it, and remember whether it is the best so far."""
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    start = time.perf_counter()
    metrics, samples = test_student(cfg, run, "evaluate")
    metrics["seconds"] = time.perf_counter() - start
    note_time(state, {"tokens": round(metrics["mean_length"] * len(samples))}, {"evaluation": metrics["seconds"]})
    step = state["step"]
    folder.write_samples(step, samples)
    folder.log({"step": step, "eval": metrics})
    for log in track:
        log({f"eval/{key}": value for key, value in metrics.items()}, step)
    if better(metrics, state["best"]):
        state["best"], state["best_step"] = metrics.get(judged_by(metrics)), step
    state["after"] = metrics
    tqdm.write(test_line("eval   ", metrics))
    tqdm.write(example(run, samples, step))


def finish(cfg: Config, folder: RunFolder, state: dict, run: Setup, memory_before: int) -> None:
    key = judged_by(state["after"])
    folder.write_summary({"before": state["before"], "after": state["after"], "teacher": state["teacher"],
                          "steps": state["step"], "seconds": state["seconds"], "tokens": state["tokens"],
                          "best": {"step": state["best_step"], **({key: state["best"]} if key else {})},
                          "skipped": state["skipped"], "empty": state["empty"], "sampler_gap": state["sampler_gap"],
                          "recipe": cfg.recipe, "timings": timings(state),
                          "planned_memory": run.planned_memory,
                          "peak_memory": used_memory(run.student.device, memory_before)})
    print(folder.summary(lambda summary: closing_line(folder, summary)))


def closing_line(folder: RunFolder, summary: dict) -> str:
    shares = "  ".join(f"{phase} {t['share']:.0%}"
                       + (f" ({t['tokens_per_second']:,.0f} tokens/s)" if t["tokens_per_second"] else "")
                       for phase, t in summary["timings"].items())
    return (f"done    held-out {change(summary['before'], summary['after'], summary['teacher'])} in "
            f"{summary['steps']} steps, {summary['seconds']:.0f} s\n"
            f"        {shares}, peak memory {size_text(summary['peak_memory'])}\n"
            f"        sampler and trainer at most {summary['sampler_gap']:.1e} nats per token apart\n"
            f"        in {folder.path}: the trained model last/, the best one best/, metrics.jsonl, samples/, "
            f"summary.json")


def advice(complaint: str, cfg: Config, path: Path) -> str:
    """What to do when numbers went bad, by whose they are."""
    if "the student" not in complaint:
        return f"look at its checkpoint, or pass --dtype float32; the checkpoints in {path} stay as they were"
    return (f"--lr {cfg.lr:g} is too high, or --temperature {cfg.temperature:g} too low, or its checkpoint is damaged; "
            f"the checkpoints in {path} are from before and stay: change a flag and pass another --name")


def main(argv: list[str] | None = None) -> int:
    try:
        cfg, given = parse(sys.argv[1:] if argv is None else argv)
        check(cfg)
        parallel.check(cfg)
        path = run_path(cfg.runs, cfg.name or run_name(cfg, given))
        lasting = {key: value for key, value in asdict(cfg).items() if key not in NOT_THE_RUN}
        look_only = cfg.plan or cfg.report_only
        # os.path.exists: False where the path itself is impossible
        if os.path.exists(path / "summary.json") and not (cfg.fresh or look_only):
            folder = parallel.run_folder(RunFolder, path, lasting)
            print(f"{path} is complete; pass --fresh to run it again, or change a flag for another run")
            print(folder.summary(lambda summary: closing_line(folder, summary)))
            return 0
        give_back_freed_memory()
        memory_before = used_memory(torch.device("cpu"))
        torch.manual_seed(cfg.seed)     # nothing draws from the global stream; if a fork does, it is at least fixed
        stored = {} if cfg.fresh or look_only else started(path)
        # a template that prints the date prints that of the run's first start, on whatever day it goes on
        Tokenizer.started = datetime.fromisoformat(stored["date"]) if stored.get("date") else datetime.now()
        cfg, run = set_up(cfg, stored)
        if cfg.report_only:
            return report(cfg, run)
        folder = parallel.run_folder(RunFolder, path, lasting, cfg.fresh)
        folder.note_start({"date": Tokenizer.started.isoformat(), "torch": torch.__version__, **chosen(cfg)})
        return train(cfg, folder, run, memory_before)
    except NotFinite as error:
        parallel.complain(f"error: {one_line(error)}; {advice(str(error), cfg, path)}")
        return 2
    except UserError as error:
        parallel.complain(f"error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:       # before the loop, or the second signal in it
        parallel.complain("stopped at once; the same command goes on from the last checkpoint, if there is one")
        return 130


if __name__ == "__main__":
    sys.exit(parallel.run(main))
