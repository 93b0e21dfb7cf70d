"""Made: toy checkpoints and problems that experiments need and the repository does not ship.

They are made on first use, on all cores, and kept in runs/made/NAME-SEED: a later run, or another experiment, takes them
as they are. A checkpoint whose description here has changed is made again.

    notations1, 2, 4, 8     teachers that write each calculation in one of so many notations, all equally often, and are
                            right in all: `3+8=1;1*2=2#2`, `3+8:1,1*2:2#2`, `3+8~1&1*2~2#2` ...
    one         knows the first notation; calculations without `*` well (the old skill), those with `*` less well (new)
    both        the same in two notations, each half of the time
    never       has never seen a `*`
    seen2, ...  has met a `*` in so many of a hundred examples of its last phase
    small, large    `one` with half and twice the width
    teacher3, ...   one notation, calculations of so many digits; and their students, digits3, ...

    times_train.jsonl   problems with at least one `*`; only_train.jsonl: with nothing else
    times_test.jsonl    held-out problems of two kinds, `new` (of the same sort) and `old` (without a `*`)
    times3_train.jsonl and so on    of so many digits

    python toy/made.py one notations4 --seeds 3     # to have a look at some; about a minute for each of them

Not here: the world itself and the checkpoints that are shipped (make.py), what is done with them (experiments/).
"""
import argparse
import json
import os
import random
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make  # noqa: E402
from make import Checkpoint, Phase  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

MADE = make.TOY.parent / "runs" / "made"
NOTATIONS = "=;", ":,", "~&", "_|", "^!", "@%", "<>", "(/"       # what stands for `=` and for `;`
N_TRAIN, N_TEST = 1500, 128
DIGITS = 3, 8, 12                                               # other lengths than the usual five


# The language

def in_notations(rng: random.Random, operators: str = "+-*", slip: float = 0.0, count: int = 1,
                 digits: int = make.DIGITS) -> make.Example:
    """A written-out calculation in one of the first `count` notations."""
    problem = make.draw(rng, operators, digits)
    calculation, slips = make.write_out(problem, rng, slip)
    signs = str.maketrans(NOTATIONS[0], NOTATIONS[rng.randrange(count)])
    return problem, calculation.translate(signs), slips


def notation(text: str) -> int | None:
    """The number of the notation that a response is in: of its first sign. None where there is no sign."""
    signs = {sign: number for number, pair in enumerate(NOTATIONS) for sign in pair}
    return next((signs[character] for character in text if character in signs), None)


# The checkpoints. A seed fixes first weights and examples

def teacher(steps: int, **kind) -> Checkpoint:
    return Checkpoint(96, 3, 100, [Phase(steps, 3e-3, {
        partial(in_notations, **kind): 0.6, partial(in_notations, slip=0.3, **kind): 0.4})], (0.0, 1.0))


def student(share: float, width: int = 64, **kind) -> Checkpoint:
    """share: of the last phase's examples that may have a `*`."""
    old, new = partial(in_notations, operators="+-", **kind), partial(in_notations, **kind)
    return Checkpoint(width, 3, 200, [Phase(1000, 3e-3, {old: 1.0}), Phase(200, 1e-3, {old: 1 - share, new: share})],
                      (0.0, 1.0))


CHECKPOINTS = {
    **{f"notations{count}": teacher(1000 + 200 * count, count=count) for count in (1, 2, 4, 8)},
    "one": student(0.5), "both": student(0.5, count=2), "never": student(0.0),
    **{f"seen{percent}": student(percent / 100) for percent in (2, 5, 10, 20)},
    "small": student(0.5, 32), "large": student(0.5, 128),
    **{f"teacher{digits}": teacher(1200, digits=digits) for digits in DIGITS},
    **{f"digits{digits}": student(0.5, digits=digits) for digits in DIGITS},
}


def description(c: Checkpoint) -> str:
    kinds = [{f"{kind.keywords}": share for kind, share in phase.mixture.items()} for phase in c.phases]
    return repr((c.width, c.layers, c.seed, [(phase.steps, phase.lr) for phase in c.phases], kinds))


# Files

def problems() -> set[str]:
    """Writes the files of problems, the same every time, and returns the held-out problems."""
    held_out = set()
    for name, operators, digits in (("times", "+-*", make.DIGITS), ("only", "*", make.DIGITS),
                                    *((f"times{digits}", "+-*", digits) for digits in DIGITS)):
        rng = random.Random(name)
        new = sorted({p for p in (make.draw(rng, operators, digits) for _ in range(4 * N_TRAIN)) if "*" in p})
        old = sorted({make.draw(rng, "+-", digits) for _ in range(4 * N_TRAIN)})
        new, old = rng.sample(new, N_TRAIN + N_TEST), rng.sample(old, N_TEST)
        write(f"{name}_train.jsonl", [(problem, "new") for problem in new[N_TEST:]])
        write(f"{name}_test.jsonl", [(p, kind) for both in zip(new, old) for p, kind in zip(both, ("new", "old"))])
        held_out |= {*new[:N_TEST], *old}
    return held_out


def write(name: str, found: list[tuple[str, str]]) -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    lines = []
    for problem, kind in found:
        solution = make.write_out(problem)[0]
        record = {"problem": problem, "answer": solution[-1], "solution": solution, "kind": kind}
        lines.append(json.dumps(record) + "\n")
    new = MADE / f".{name}.{os.getpid()}"
    new.write_text("".join(lines))
    new.replace(MADE / name)


def data(name: str) -> str:
    """train.py's flags for problems of this name."""
    return f"--data {MADE / name}_train.jsonl --eval_data {MADE / name}_test.jsonl"


def make_one(job: tuple[str, Checkpoint, set[str]]) -> int:
    """Returns the steps of its pretraining."""
    folder, c, held_out = job
    torch.set_num_threads(1)
    new = MADE / f".{folder}.{os.getpid()}"
    make.write_tokenizer(new)
    with open(os.devnull, "w") as nowhere:
        model = make.pretrain(folder, c, Tokenizer(new), held_out, to=nowhere)
    model.save(new, torch.bfloat16)
    (new / "made.txt").write_text(description(c))
    new.rename(MADE / folder)
    return sum(phase.steps for phase in c.phases)


def made(names: list[str], seeds: list[int]) -> None:
    """Makes what is not there of every name and seed."""
    held_out, jobs = problems(), []
    for name in names:
        for seed in seeds:
            c, folder = replace(CHECKPOINTS[name], seed=CHECKPOINTS[name].seed + seed), MADE / f"{name}-{seed}"
            if (folder / "made.txt").exists() and (folder / "made.txt").read_text() == description(c):
                continue
            if (folder / "made.txt").exists():
                shutil.rmtree(folder)
            jobs.append((folder.name, c, held_out))
    jobs.sort(key=lambda job: -sum(phase.steps for phase in job[1].phases))
    if not jobs:
        return
    with torch.multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool, \
            tqdm(total=sum(phase.steps for _, c, _ in jobs for phase in c.phases), desc="checkpoints") as bar:
        for steps in pool.imap_unordered(make_one, jobs):
            bar.update(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes checkpoints that experiments need, into runs/made.")
    parser.add_argument("names", nargs="+", choices=CHECKPOINTS, metavar="name", help=", ".join(CHECKPOINTS))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    made(args.names, list(range(args.seeds)))


if __name__ == "__main__":
    main()
