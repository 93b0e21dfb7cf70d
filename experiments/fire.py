"""FiRe-OPD when part of the rollouts is beyond the teacher.

    python experiments/fire.py                  # about 10 minutes on two idle cores

Claim      Responses that a teacher finds unlikely are beyond its competence and teach nothing; dropping
           them (a fifth of the step) and weighting tokens by teacher confidence and student uncertainty
           beats plain sampled OPD, the filter mattering most. Several specialists, each problem routed to
           its own, beat one.
Paper      FiRe-OPD, arXiv:2606.02684, equations 4 to 9, table 5 (ablation) and table 4 (several teachers).
Design     Half of the problems have no `*`, half nothing else. toy/teacher_low never saw a `*`: it is right
           on 100 % of the one half and 6 % of the other. Two students: toy/student, which mostly answers
           directly, and one that two routed specialists have trained for 40 steps, which has something to
           lose. All arms share the sampled policy gradient and its reduction, so that only filter and
           weights differ; `random drop` is the control for dropping a fifth of the tokens whatever they
           are. Last, a teacher that is right everywhere.
Against    fire no better than plain where the teacher is lost (column `only *`); the filter no better than
           the random drop; the teacher's likelihood no guide to right and wrong.
"""
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from compare import (TOY, accuracy_by, arguments, columns, differences, number, options, percent, ready, run_all, slug,
                     table)
import train
from extras.report import student_batch
from losses import WEIGHTS, sequence_mean

MIXED = f"--data {TOY / 'mixed_train.jsonl'} --eval_data {TOY / 'mixed_test.jsonl'}"
LOW, ROUTED = TOY / "teacher_low", f"low={TOY / 'teacher_low'},high={TOY / 'teacher_high'}"
FLAGS = "--steps 60 --eval_every 0 --no-eval_teacher"
START = {"start": "multi --steps 40 --eval_every 0 --no-eval_teacher"}
ABLATION = {
    "plain": "fire --weight none",
    "fire": "fire",
    "filter only": "fire --fire_alpha 0 --fire_beta 0",
    "weights only": "fire --fire_drop 0",
    "random drop": "fire --weight random --keep 0.8"}
ONE = {f"low alone: {label}": f"{command} --teacher {LOW}" for label, command in ABLATION.items()}
BOTH = {f"both routed: {label}": f"{command} --teacher {ROUTED} --route kind" for label, command in (
    ("plain", "fire --weight none"), ("fire", "fire"), ("fire, ranked per teacher", "fire --fire_filter teacher"))}


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    """name -> (arms, flags of all its arms). `trained` starts from the runs of `start`."""
    trained = f"--student {runs.resolve() / 'start' / 'start-{seed}' / 'last'}"
    return {"start": (START, ""),
            "toy/student": (ONE | BOTH, f"{FLAGS} {MIXED}"),
            "trained": (ONE | BOTH, f"{FLAGS} {MIXED} {trained}"),
            "right teacher": ({f"right everywhere: {label}": ABLATION[label] for label in ("plain", "fire")}, FLAGS)}


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Chance that a positive's score is above a negative's, ties half."""
    above = positive[:, None] - negative
    return ((above > 0).double() + (above == 0).double() / 2).mean().item()


def dropped(flags: str, seed: int, runs: Path) -> list[float]:
    """What the filter would drop of 512 responses before the first step: share without `*`, share with only `*`;
    how well its score tells the two kinds apart, right responses from wrong ones, the same among only `*`."""
    line = arguments(ONE["low alone: fire"], f"{flags} --problems 512", seed, runs / "look")
    with redirect_stdout(sys.stderr):
        run = ready(line)
        batch = student_batch(run)
        s = train.signals(run, batch, run.teacher.parts(batch))
    score_B, kept_B = sequence_mean(s.teacher_logp_N, s), sequence_mean(WEIGHTS["fire"](s, run.cfg), s) > 0
    high_B = torch.tensor([problem.fields["kind"] == "high" for problem in batch.problems])
    right_B = batch.reward_B > 0
    lost_B = (~kept_B).double()
    return [lost_B[~high_B].mean().item(), lost_B[high_B].mean().item(), auroc(score_B[~high_B], score_B[high_B]),
            auroc(score_B[right_B], score_B[~right_B]), auroc(score_B[right_B & high_B], score_B[~right_B & high_B])]


def print_dropped(seeds: int, runs: Path) -> None:
    rows = []
    for name in ("toy/student", "trained"):
        low, high, *aurocs = columns([dropped(stages(runs)[name][1], seed, runs) for seed in range(seeds)])
        rows.append([name, percent(low), percent(high), *map(number, aurocs)])
    table(["what teacher_low's likelihood sees", "dropped of without `*`", "dropped of only `*`", "AUROC competence",
           "AUROC right from wrong", "the same, only `*`"], rows)


def print_arms(name: str, found: dict[str, list[Path]]) -> None:
    """One row per arm: accuracy by kind of problem; against the plain arm of the same teacher, seed by seed."""
    def kinds(folder: Path, step: int | None = None) -> list[float]:
        by = accuracy_by(folder, lambda record: record.get("kind", "low"), step)
        both = sum(by.values()) / len(by)
        return [both, by["low"], by.get("high", float("nan"))]
    after = {label: [kinds(folder) for folder in folders] for label, folders in found.items()}
    before = [kinds(folder, 0) for folder in next(iter(found.values()))]
    split = name != "right teacher"

    def cells(values: list[list[float]]) -> list[str]:
        return [percent(column) for column in columns(values)[:3 if split else 1]]
    rows = [["before", *cells(before), ""]]
    for label, values in after.items():
        baseline = after[f"{label.split(':')[0]}: plain"]
        gain = differences([v[0] for v in values], [v[0] for v in baseline])
        rows.append([label, *cells(values), "" if values is baseline else percent(gain, "+")])
    table([f"{name}: teacher and arm", "all", *(["without `*`", "only `*`"] if split else []), "against plain"], rows)


def main() -> None:
    args = options(__doc__, "fire", seeds=5)
    plan = stages(args.runs)
    for name, (arms, flags) in plan.items():
        found = run_all(arms, flags, args.seeds, args.runs / slug(name))
        if name == "trained":
            print_dropped(args.seeds, args.runs)
        if name != "start":
            print_arms(name, found)


if __name__ == "__main__":
    main()
