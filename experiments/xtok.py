"""Cross-tokenizer OPD: a teacher that reads the student's text in its own words.

    python experiments/xtok.py                  # about 12 minutes on two idle cores

Claim      On-policy distillation works across tokenizers, and takes far less compute than imitating text
           that the teacher writes; how a chunk's log-ratio is shared out among its tokens matters.
Paper      DPCA, arXiv:2606.09456 (chunks, proportional credit, compute); strict 1:1 distillation,
           arXiv:2610.08448; ULD, arXiv:2402.12030; GOLD (TRL). `chunk` and `prefix` are ours: chunk_credit.py.
Design     toy/student reads bytes, toy/teacher_bpe words of up to three bytes: about half of the student's
           tokens have no teacher token of their own. Every arm: 60 steps of 64 responses, one learning rate.
           `same tokenizer` is toy/teacher, sampled-token loss, as an upper bound.
           FLOPs by formula: forward 2 per weight and token (prompt included; the head on response tokens
           only; attention scores left out), backward twice that. Student: writing and update; teacher:
           reading what the student wrote, or writing.
Against    `chunk` no better than `prop` or `uniform`; SFT there with less compute.
"""
import json
from pathlib import Path

import numpy as np
import torch

from compare import ROOT, TOY, accuracy_key, cost_to_reach, number, options, percent, records, run_all, summary, table
from model import Transformer
from support.tokenizer import Tokenizer
from support.weights import load_config

ACROSS = f"--teacher {TOY / 'teacher_bpe'}"
ARMS = {
    "same tokenizer": f"xtok --teacher {TOY / 'teacher'}",
    "chunk": f"xtok {ACROSS}",
    "prefix": f"xtok {ACROSS} --chunk_credit prefix",
    "shift": f"xtok {ACROSS} --chunk_credit shift",
    "prop (paper)": f"xtok {ACROSS} --chunk_credit prop",
    "uniform": f"xtok {ACROSS} --chunk_credit uniform",
    "strict": f"xtok {ACROSS} --chunk_credit strict",
    "strict, whole vocabulary": f"xtok {ACROSS} --divergence reverse_kl",
    "GOLD-style": f"xtok {ACROSS} --divergence gold",
    "ULD": f"xtok {ACROSS} --divergence uld",
    "SFT on teacher text": f"sft {ACROSS} --responses teacher"}
STEPS = (15, 30, 45, 60)
TARGETS = (0.6, 0.8)


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    return {"xtok": (ARMS, "--steps 60 --eval_every 15 --lr 1e-4 --min_coverage 0 --no-eval_teacher")}


def forward_flops(folder: str, prompts: int, responses: int) -> float:
    """2 per weight and token: the body reads prompts and responses, the head response tokens only."""
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if config.tie_word_embeddings else 2)
    return 2.0 * body * (prompts + responses) + 2.0 * head * responses


def prompt_tokens(folder: str, data: str) -> float:
    """Mean over the problems."""
    tokenizer = Tokenizer(folder)
    problems = [json.loads(line)["problem"] for line in Path(data).read_text().splitlines()]
    return float(np.mean([len(tokenizer.prompt_ids(problem)) for problem in problems]))


def spent(folder: Path) -> list[tuple[int, float, float, float]]:
    """(step, accuracy, FLOPs so far, the teacher's among them) at every evaluation."""
    cfg = json.loads((folder / "config.json").read_text())
    cfg |= {key: str(Path(ROOT, cfg[key])) for key in ("student", "teacher", "data")}
    sequences = cfg["problems"] * cfg["samples"]
    asked = {side: prompt_tokens(cfg[side], cfg["data"]) * sequences for side in ("student", "teacher")}
    points, total, teacher = [], 0.0, 0.0
    for record in records(folder):
        if "eval" in record:
            points.append((record["step"], record["eval"][accuracy_key(folder)], total, teacher))
            continue
        own = forward_flops(cfg["student"], asked["student"], record["tokens"])
        theirs = forward_flops(cfg["teacher"], asked["teacher"], record.get("teacher_tokens", record["tokens"]))
        total += own * (3 + record["on_policy"]) + theirs
        teacher += theirs
    return points


def main() -> None:
    args = options(__doc__, "xtok", seeds=5)
    (arms, flags), = stages(args.runs).values()
    runs = run_all(arms, flags, args.seeds, args.runs)
    rows, shares = [], []
    for label, folders in runs.items():
        curves = [spent(folder) for folder in folders]
        accuracy = [{step: value for step, value, *_ in points} for points in curves]
        reached = [[cost_to_reach(points, target) / 1e9 for points in curves] for target in TARGETS]
        rows.append([label, *(percent([one[step] for one in accuracy]) for step in STEPS),
                     *(number(found, ".0f") if max(found) < float("inf") else
                       f"{sum(value < float('inf') for value in found)} of {len(found)} arrive" for found in reached),
                     f"{np.mean([points[-1][2] for points in curves]) / 1e9:,.0f}",
                     f"{np.mean([points[-1][3] / points[-1][2] for points in curves]):.0%}"])
        spans = [record["align_seconds"] / record["seconds"] for folder in folders for record in records(folder)
                 if "align_seconds" in record]
        shares += spans
    table(["avg@8 at step", *map(str, STEPS), *(f"GFLOP to {target:.0%}" for target in TARGETS), "in all",
           "teacher's share"], rows)
    coverage = [record["strict_coverage"] for record in records(runs["chunk"][0]) if "strict_coverage" in record]
    print(f"start {np.mean([summary(folder)['before'][accuracy_key(folder)] for folder in runs['chunk']]):.1%}; "
          f"{coverage[0]:.0%} of the student's tokens have a teacher token of their own in the first step, "
          f"{coverage[-1]:.0%} in the last; reading and cutting the text takes {np.mean(shares):.1%} of a step")


if __name__ == "__main__":
    main()
