"""OPSD: a student that is shown the solution teaches the one that is not.

    python experiments/opsd.py                  # about 7 minutes on two idle cores

Claim      Without a larger teacher a student passes its own start, because the same weights, shown the
           solution, judge its tokens better; forward KL with every vocabulary entry clipped beats other
           directions, and plain forward KL decays; the accuracy of GRPO is reached with a fraction of the
           tokens generated.
Paper      OPSD, arXiv:2601.18734 v3: equation 8, section 3.2 (clip), table 3 (direction), figure 3
           (tokens).
Design     toy/self copies a calculation that is shown before the problem, on its own it is often wrong.
           Teacher: its initial weights, shown the solution. Five losses of one learning rate, evaluated at
           steps 15, 30, 45, 60; GRPO on the same problems and as many responses per step, for twice as
           long.
Against    no gain over the start; the clip no better than none; forward no better than reverse; GRPO there
           with fewer tokens.
"""
from pathlib import Path

import numpy as np

from compare import TOY, cost_to_reach, curve, options, percent, run_all, table

ARMS = {
    "forward, clipped": "opsd",
    "forward": "opsd --entry_clip 0",
    "reverse, clipped": "opsd --divergence reverse_kl",
    "reverse": "opsd --divergence reverse_kl --entry_clip 0",
    "policy gradient": "opsd --divergence policy_gradient --entry_clip 0"}
VERIFIER = {"grpo": f"grpo --student {TOY / 'self'} --steps 120"}
STEPS = (15, 30, 45, 60)
TARGETS = (0.5, 0.9, 0.95)


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    return {"opsd": (ARMS | VERIFIER, "--eval_every 15 --no-eval_teacher")}


def counted(values: list[float]) -> str:
    """`12,345 (4 of 5)`: the mean over the seeds that arrived, and how many did."""
    arrived = [value for value in values if value < float("inf")]
    return f"{np.mean(arrived):,.0f} ({len(arrived)} of {len(values)})" if arrived else "never"


def main() -> None:
    args = options(__doc__, "opsd", seeds=5)
    (arms, flags), = stages(args.runs).values()
    runs = run_all(arms, flags, args.seeds, args.runs)
    curves = {label: [curve(folder) for folder in folders] for label, folders in runs.items()}
    accuracy = {label: [{step: value for step, value, *_ in points} for points in found]
                for label, found in curves.items()}
    rows = [[label, *(percent([one[step] for one in found]) for step in (0, *STEPS))]
            for label, found in accuracy.items()]
    table(["avg@8 at step", "0", *map(str, STEPS)], rows)
    rows = [[label, *(counted([cost_to_reach(points, target) for points in found]) for target in TARGETS),
             f"{np.mean([points[-1][2] for points in found]):,.0f}"] for label, found in curves.items()]
    table(["tokens generated to reach", *(f"{target:.0%}" for target in TARGETS), "in all"], rows)


if __name__ == "__main__":
    main()
