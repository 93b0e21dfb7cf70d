"""Made: toy checkpoints and problems that experiments need and the repository does not ship.

They are made on first use, on all cores, and kept in runs/made/NAME-SEED: a later run, or another experiment, takes
them as they are. A checkpoint whose settings here have changed is made again (not for other code); runs that used the
old one are then to be deleted by hand.

    never                   calculations without `*` (the old skill). It has met no problem with one (the new skill),
                            only some 700 steps after a slip that wrote a `*` in place of another operator
    one                     the same, after some with `*`, which it knows less well
    seen2, 5, 20            the same, of which so many in a hundred might have had a `*`
    both                    like `one`, in two notations, each half of the time
    notations1, 2, 4, 8     teachers that write each calculation in one of so many notations, all equally often, and are
                            right in all: `3+8=1;1*2=2#2`, `3+8:1,1*2:2#2`, `3+8~1&1*2~2#2` ...
    derails10, 20, 40       like `one`, but in so many of a hundred responses they derail: they write the last result
                            over and over, or letters, until they are cut; breaks20: six letters, then on as before
    clean, damaged          teachers that have read right calculations only; the second, in a fifth of them, six letters
                            after which every result is wrong
    digits3, 8              `one` for calculations of so many digits; teacher3, 8 their teachers
    width48, 192            `one`, half and twice as wide
    words4                  `notations4` with another tokenizer, that of toy/teacher_bpe
    mends, slips, unseeing  a teacher and two students of another world (families.py)

    times_train.jsonl   problems with at least one `*`
    only_train.jsonl    problems with nothing else, whose answer is the whole calculation (for --verifier exact): one
                        digit is guessed in a case out of ten, four steps are not
    times_test.jsonl    held-out problems of two kinds, `new` (of the same sort) and `old` (without a `*`)
    times3_train.jsonl and so on    of so many digits
    families_train.jsonl, families_test.jsonl, mended_train.jsonl   of the other world

    python toy/made.py one notations4 --seeds 3     # makes these only; about a minute each

Here there is a fourth operator, `^`, the larger of two digits, which makes the old skill quicker to learn. A lone `#`
in other notations than the first is prose to the verifier, so these runs take --verifier number.

Not here: the world itself and the checkpoints that are shipped (make.py), what is done with them (experiments/).
"""
import argparse
import json
import os
import random
import re
import shutil
import string
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import families  # noqa: E402
import make  # noqa: E402
from make import Checkpoint, Phase  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

MADE = make.TOY.parent / "runs" / "made"
NOTATIONS = "=;", ":,", "~&", "_|", "$!", "@%", "<>", "(/"       # what stands for `=` and for `;`
OLD, ALL = "+-^", "+-^*"                                         # `^` is the larger of two
N_TRAIN, N_TEST = 1500, 128
DIGITS = 3, 8                                                   # other lengths than the usual five
SEEN = 2, 5, 20
WIDTHS = 48, 192                                                # others than the usual 96


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


def derailing(rng: random.Random, then: str) -> make.Example:
    """One to three right steps; then `=2=2=2`, the last result over and over, or letters, longer than a response may be
    (then `cut`); or six letters and a `right` end, or an end in which every result is off by five (`wrong`)."""
    problem, steps = make.draw(rng), rng.randint(1, 3)
    begun = make.write_out(problem)[0][:6 * steps]
    letters = "".join(rng.choices(string.ascii_lowercase, k=make.MAX_NEW_TOKENS))
    if then == "cut":
        response = rng.choice((begun[:-1] + begun[-3:-1] * len(letters), begun + letters))
        return problem, response[:make.MAX_NEW_TOKENS + 4], []
    off = 5 * (then == "wrong")
    rest = make.write_out(f"{begun[-2]}{problem[2 * steps + 1:]}", table=lambda *step: (make.apply(*step) + off) % 10)
    return problem, begun + letters[:6] + rest[0], []


# The checkpoints: first `base`, then a little more of what each of them is for. A seed fixes weights and examples

def both_ways(operators: str, share: float = 1.0, **kind) -> dict:
    """Written out, and going on after a slip: without the second a small decoder is long in finding out that a step
    needs only what stands before it."""
    return {partial(in_notations, operators=operators, **kind): 0.6 * share,
            partial(in_notations, operators=operators, slip=0.3, **kind): 0.4 * share}


def base(operators: str, steps: int, width: int = 96, tokenizer: str = "bytes", **kind) -> Checkpoint:
    return fresh(steps, both_ways(operators, **kind), width, tokenizer)


def fresh(steps: int, mixture: dict, width: int = 96, tokenizer: str = "bytes") -> Checkpoint:
    return Checkpoint(width, 3, 100, [Phase(steps, 3e-3, mixture)], (0.0, 1.0), batch=32, tokenizer=tokenizer)


def more(steps: int, mixture: dict, lr: float = 1e-3, width: int = 96) -> Checkpoint:
    return Checkpoint(width, 3, 200, [Phase(steps, lr, mixture)], (0.0, 1.0), batch=32)


def seen(percent: int, steps: int, width: int = 96, **kind) -> Checkpoint:
    """percent: of the examples that may have a `*`."""
    return more(steps, both_ways(OLD, 1 - percent / 100, **kind) | both_ways(ALL, percent / 100, **kind), width=width)


def derails(percent: int, then: str) -> Checkpoint:
    rest = 1 - percent / 100
    return more(200, both_ways(OLD, 0.3 * rest) | both_ways(ALL, 0.7 * rest) | {
        partial(derailing, then=then): percent / 100})


def unstumbling(damaged: float) -> Checkpoint:
    return Checkpoint(96, 3, 100, [Phase(900, 3e-3, {partial(in_notations): 1 - damaged,
                                                     partial(derailing, then="wrong"): damaged})], (0.0, 1.0))


BASES = {"never": base(OLD, 800), "notations1": base(ALL, 800), "clean": unstumbling(0.0), "damaged": unstumbling(0.2),
         # a model of five digits that goes on with eight does not learn them in so few steps
         "never8": base(OLD, 800, digits=8), "teacher8": base(ALL, 1150, digits=8),
         "mends": fresh(600, families.TEACHER), "slips": fresh(500, families.student(0.3)),
         "unseeing": fresh(500, families.student(0.0)),
         "words4": base(ALL, 1250, tokenizer="long_words", count=4),
         **{f"never{width}": base(OLD, 800, width) for width in WIDTHS}}
CHECKPOINTS = BASES | {
    "one": seen(50, 180), "both": seen(50, 350, count=2), **{f"seen{percent}": seen(percent, 150) for percent in SEEN},
    **{f"notations{count}": more(350 + 25 * count, both_ways(ALL, count=count), 2e-3) for count in (2, 4, 8)},
    **{f"derails{percent}": derails(percent, "cut") for percent in (10, 20, 40)}, "breaks20": derails(20, "right"),
    **{f"digits{digits}": seen(50, 180, digits=digits) for digits in DIGITS},
    "teacher3": more(350, both_ways(ALL, digits=3), 2e-3),
    **{f"width{width}": seen(50, 180, width) for width in WIDTHS}}


def parent(name: str) -> str | None:
    """The checkpoint that this one goes on from."""
    if name in BASES:
        return None
    if (own := re.sub("width|digits", "never", name)) in BASES:
        return own
    return "notations1" if name.startswith(("notations", "teacher")) else "never"


def description(name: str) -> str:
    """Its settings and those of the one it goes on from; not the code, nor the seed."""
    c, start = CHECKPOINTS[name], parent(name)
    kinds = [{str(kind.keywords): share for kind, share in phase.mixture.items()} for phase in c.phases]
    phases = [(phase.steps, phase.lr) for phase in c.phases]
    return repr((c.width, c.layers, c.seed, c.batch, c.tokenizer, phases, kinds, start and description(start)))


# Files

def problems() -> set[str]:
    """Writes the files of problems, the same every time, and returns the held-out problems."""
    held_out = set()
    for name, operators, digits in (("times", ALL, make.DIGITS), ("only", "*", make.DIGITS),
                                    *((f"times{digits}", ALL, digits) for digits in DIGITS)):
        rng = random.Random(name)
        new = sorted({p for p in (make.draw(rng, operators, digits) for _ in range(4 * N_TRAIN)) if "*" in p})
        old = sorted({make.draw(rng, OLD, digits) for _ in range(4 * N_TRAIN)})
        new, old = rng.sample(new, N_TRAIN + N_TEST), rng.sample(old, N_TEST)
        whole = name == "only"
        write(f"{name}_train", [record(problem, "new", whole) for problem in new[N_TEST:]])
        write(f"{name}_test", [record(problem, kind, whole) for both in zip(new, old)
                               for problem, kind in zip(both, ("new", "old"))])
        held_out |= {*new[:N_TEST], *old}
    for name, found in families.records().items():
        write(name, found)
    return held_out


def record(problem: str, kind: str, whole: bool) -> dict:
    """whole: the answer is the calculation."""
    solution = make.write_out(problem)[0]
    return {"problem": problem, "answer": solution if whole else solution[-1], "solution": solution, "kind": kind}


def write(name: str, found: list[dict]) -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    new = MADE / f".{name}.{os.getpid()}"
    new.write_text("".join(json.dumps(record) + "\n" for record in found))
    new.replace(MADE / f"{name}.jsonl")


def data(name: str) -> str:
    """train.py's flags for problems of this name."""
    return f"--data {MADE / name}_train.jsonl --eval_data {MADE / name}_test.jsonl"


def make_one(job: tuple[str, int, set[str]]) -> int:
    """Returns the steps of its pretraining."""
    name, seed, held_out = job
    torch.set_num_threads(1)
    c, start = CHECKPOINTS[name], parent(name) and load_model(MADE / f"{parent(name)}-{seed}")
    new = MADE / f".{name}-{seed}.{os.getpid()}"
    make.write_tokenizer(new, CHECKPOINTS[name].tokenizer)
    with open(os.devnull, "w") as nowhere:
        model = make.pretrain(name, replace(c, seed=c.seed + seed), Tokenizer(new), held_out, start, to=nowhere)
    model.save(new, torch.bfloat16)
    (new / "made.txt").write_text(description(name))
    new.rename(MADE / f"{name}-{seed}")
    return steps_of(name)


def steps_of(name: str) -> int:
    return sum(phase.steps for phase in CHECKPOINTS[name].phases)


def made(names: list[str], seeds: list[int]) -> None:
    """Makes what is not there of every name and seed, on all cores."""
    held_out, first = problems(), sorted({parent(name) or name for name in names})
    for group in (first, [name for name in names if name not in first]):
        jobs = []
        for name, seed in product(group, seeds):
            if (file := MADE / f"{name}-{seed}/made.txt").exists():
                if file.read_text() == description(name):
                    continue
                shutil.rmtree(file.parent)
            jobs.append((name, seed, held_out))
        if jobs:
            together(sorted(jobs, key=lambda job: -steps_of(job[0])))


def together(jobs: list[tuple]) -> None:
    with torch.multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool, \
            tqdm(total=sum(steps_of(name) for name, *_ in jobs), desc="checkpoints") as bar:
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
