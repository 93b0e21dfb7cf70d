"""How long until the student answers 90 % of the held-out problems: this project against TRL's GKDTrainer and
DistillationTrainer, on the toy pair.

    python bench/learn.py --picture learn.svg                   # three seeds of each, one after the other

The checkpoints, problems, order of problems, batch, loss (reverse KL over the whole vocabulary on the student's own
samples), AdamW and learning rates of plain `python train.py`, in float32, for all of them; TRL's settings are in
trl_trainers.py. Every run is a process of its own with one thread, seed by seed, variant by variant. Only training is
timed: from the first batch on, with the clocks stopped while held-out problems are answered, which this project's
eval.py does for all of them every few steps. Seconds of processor time (common.interleaved says why) and of the wall.
Where two evaluations stand on the two sides of the goal, the seconds between them are divided in proportion.

Ends with one JSON line: ratio is the faster of the TRL trainers over this project, medians over the seeds.
"""
import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from common import in_own_process  # isort: skip

import torch

import train
from eval import test
from support.extras import offers
from support.flags import parse
from support.used_memory import give_back_freed_memory
from support.report import Clock
from support.setup import Run, set_up

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))
import make_picture as draw  # noqa: E402

VARIANTS = {"ours": draw.BLUE, "gkd": draw.ORANGE, "distillation": "#1a7f37"}       # and the colours of their curves
CLOCKS = "processor", "wall"


def plain_run(args) -> Run:
    """What `python train.py` would train with this seed."""
    give_back_freed_memory()
    cfg, _ = parse(["--device", "cpu", "--threads", "1", "--no-eval_teacher", "--steps", str(args.steps), "--seed",
                    str(args.seed), "--eval_k", str(args.k)], train.SETTINGS)
    run = set_up(cfg, {})
    train.defaults(run)
    for attach in offers("attach"):
        attach(run)
    return run


class Curve:
    """Held-out accuracy by steps and seconds of training. The clocks stand still while it evaluates."""

    def __init__(self, run: Run, every: int):
        self.run, self.every, self.spent, self.points = run, every, dict.fromkeys(CLOCKS, 0.0), []
        self.evaluate(0)

    def evaluate(self, step: int) -> None:
        metrics = test(self.run, None)[0]
        self.points.append({"step": step, "accuracy": metrics[f"avg@{self.run.cfg.eval_k}"], **self.spent})

    def start(self) -> None:
        self.began = clocks()

    def stop(self, step: int, refresh=lambda: None) -> None:
        """After a step. refresh: brings the weights into run.student, called before an evaluation."""
        self.spent = {name: spent + now - began for (name, spent), now, began in
                      zip(self.spent.items(), clocks(), self.began)}
        if step % self.every == 0:
            refresh()
            self.evaluate(step)
        self.start()


def clocks() -> tuple[float, float]:
    """Seconds of processor time, of children too, and of the wall, as in CLOCKS."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime, time.perf_counter()


def ours(args) -> list[dict]:
    run = plain_run(args)
    curve, optimizer = Curve(run, args.every), run.make_optimizer(run.student, run.cfg)
    curve.start()
    for step in range(args.steps):
        run.step(run, optimizer, step, Clock())
        curve.stop(step + 1)
    return curve.points


def trl(args) -> list[dict]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl_trainers import build
    run = plain_run(args)
    cfg, mine = run.cfg, dict(run.student.named_parameters())
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                        for folder in (cfg.student, cfg.teacher))
    theirs = dict(student.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(cfg.student, padding_side="left", pad_token="<|end|>")
    asked = run.order(run, range(cfg.steps * cfg.problems))
    prompts = [tokenizer.decode(run.prompts[i]) for i in asked]
    assert tokenizer(prompts)["input_ids"] == [run.prompts[i] for i in asked] and mine.keys() == theirs.keys()
    curve = Curve(run, args.every)

    @torch.no_grad()
    def refresh():
        for name, parameter in mine.items():
            parameter.copy_(theirs[name])

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            curve.start()

        def on_step_end(self, arguments, state, *_, **__):
            curve.stop(state.global_step, refresh)
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.learning_rate(step, cfg, 1.0))
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(output_dir=scratch, per_device_train_batch_size=cfg.problems, max_steps=cfg.steps, bf16=False,
                        use_cpu=True, max_grad_norm=cfg.max_grad_norm, seed=cfg.seed)
        build(args.variant, student, teacher, tokenizer, prompts, cfg.max_new_tokens, settings, [Watch()],
              (optimizer, rates)).train()
    return curve.points


def seconds_to(goal: float, points: list[dict], clock: str) -> float:
    """When the accuracy first reaches the goal, on a straight line between two evaluations; infinite if it does not.

    >>> seconds_to(0.9, [{"accuracy": 0.5, "wall": 10.0}, {"accuracy": 1.0, "wall": 20.0}], "wall")
    18.0
    """
    if points[0]["accuracy"] >= goal:
        return points[0][clock]
    for before, after in pairwise(points):
        if after["accuracy"] >= goal:
            part = (goal - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[clock] + part * (after[clock] - before[clock])
    return math.inf


# What is told

def by_step(runs: list[dict]) -> None:
    """The accuracy of every variant, mean over the seeds: the same at each step when all do the same."""
    print("held-out accuracy after   step " + "".join(f"{variant:>14}" for variant in found_in(runs)))
    for number, point in enumerate(runs[0]["points"]):
        means = [statistics.mean(run["points"][number]["accuracy"] for run in of(runs, variant))
                 for variant in found_in(runs)]
        print(f"{point['step']:>30} " + "".join(f"{mean:>14.1%}" for mean in means))


def found_in(runs: list[dict]) -> list[str]:
    return list(dict.fromkeys(run["variant"] for run in runs))


def of(runs: list[dict], variant: str) -> list[dict]:
    return [run for run in runs if run["variant"] == variant]


def summary(runs: list[dict], goal: float) -> dict:
    """{"ratio": the faster TRL trainer over ours by processor time, "wall_ratio": the same by the wall, variant:
    {clock: median seconds over the seeds}}; None where the goal was not reached."""
    seconds = {variant: {clock: statistics.median(seconds_to(goal, run["points"], clock) for run in of(runs, variant))
                         for clock in CLOCKS} for variant in found_in(runs)}
    mine = seconds.get("ours", dict.fromkeys(CLOCKS, math.inf))
    ratios = [min((taken[clock] for name, taken in seconds.items() if name != "ours"), default=math.inf) / mine[clock]
              for clock in CLOCKS]
    return {"name": f"learn_{goal:g}", "ratio": known(ratios[0]), "wall_ratio": known(ratios[1]),
            **{name: {clock: known(value) for clock, value in taken.items()} for name, taken in seconds.items()}}


def known(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


def picture(runs: list[dict], goal: float) -> str:
    """The SVG: accuracy by seconds on the left, by steps on the right; one curve per run."""
    body = []
    for (left, right), key, label in zip(draw.PANELS, ("processor", "step"), ("seconds of processor time", "step")):
        most = max(point[key] for run in runs for point in run["points"])
        body += draw.axis(left, right, most, label) + draw.shares(left, right)
        body.append(draw.text((left + right) / 2, draw.TOP - 14, f"held-out accuracy by {label}", size=13))
        y = draw.scale([goal], 0, 1)[0]
        body.append(draw.line(left, y, right, y, f'stroke="{draw.GREY}" stroke-dasharray="6 4"'))
        for run in runs:
            at = [left + (right - left) * point[key] / most for point in run["points"]]
            heights = draw.scale([point["accuracy"] for point in run["points"]], 0, 1)
            body.append(draw.curve(zip(at, heights), VARIANTS[run["variant"]]))
        for row, variant in enumerate(found_in(runs)):
            body.append(draw.text(right - 10, draw.BOTTOM - 14 - 18 * row, variant, "end", colour=VARIANTS[variant]))
    return draw.drawing(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two evaluations")
    parser.add_argument("--k", type=int, default=4, help="answers per held-out problem")
    parser.add_argument("--goal", type=float, default=0.9, help="held-out accuracy")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path, help="file for the curves, one JSON line per run")
    parser.add_argument("--picture", type=Path, help="SVG file for the curves")
    parser.add_argument("--read", type=Path, help="an earlier --out file, told and drawn again instead of training")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.variant:
        points = (ours if args.variant == "ours" else trl)(args)
        print(json.dumps({"variant": args.variant, "seed": args.seed, "points": points}))
        return
    runs = [json.loads(line) for line in args.read.read_text().splitlines()] if args.read else []
    for seed, variant in [(seed, variant) for seed in args.seeds for variant in args.variants] if not runs else ():
        if found := in_own_process(variant, "--variant", variant, "--seed", str(seed)):
            runs.append(found)
            goal, last = [seconds_to(args.goal, found["points"], clock) for clock in CLOCKS], found["points"][-1]
            print(f"{variant:>13}, seed {seed}: {args.goal:.0%} after {goal[0]:5.1f} s of processor time, "
                  f"{goal[1]:5.1f} s of the wall; {last['accuracy']:.1%} after {args.steps} steps, "
                  f"{last['processor']:5.1f} s", flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(run) + "\n" for run in runs))
    if args.picture:
        args.picture.write_text(picture(runs, args.goal))
    by_step(runs)
    print(json.dumps(summary(runs, args.goal)))


if __name__ == "__main__":
    main()
