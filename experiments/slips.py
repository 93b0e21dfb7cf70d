"""Slips: what becomes of a student's slips over a long response, by whose text it learned from.

    python experiments/slips.py                 # six minutes on two cores, and seven for the models
    python experiments/slips.py --quick         # one seed, two arms: two minutes, models included
    python experiments/slips.py --rates         # the learning rates in this file, on a seed used for nothing else

Claim      Slips add up: one that is not mended spoils all that follows. In the text of a teacher that does not slip no
           slip is mended, so imitating it teaches nothing about them; on the student's own text the teacher says after
           every slip how to go on. The longer the response, the larger the gap.
Paper      DAgger, arXiv:1011.0686 (errors that grow with the square of the length, and linearly on own states); GKD,
           arXiv:2306.13649, names it as its reason. The setting is ours.
Design     The world of families (toy/families.py): a student that names a wrong parent in a case out of five and sees
           three of ten of these slips, a teacher that knows all parents and mends. 60 steps of 32 responses to problems
           about two families (`taught`). Tested: these, and two `others` where the student goes on slipping, since no
           arm meets them. Two arms learn from given solutions that slip as often as the student, and mend:
           cross-entropy learns to slip as well, reverse KL to the teacher does not. Second table: a student that sees
           no slip. The learning rate of each arm is that of 3e-5, 1e-4 and 3e-4 with the best mean of both kinds on
           the models of another seed (the second student has those of the first).
Measured   Responses of which every ancestor is right (8 each to 48 problems, temperature 1), by the number of
           ancestors. Of the names, up to the first wrong one that a response goes on with: the share of wrong ones, and
           of these the share after which it tries again.
Against    the arms as far apart for one to three ancestors as for ten to twelve; the last arm no better than
           imitation of the teacher's text, though slips are mended in what it reads.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from compare import ROOT, TOY, differences, percent, run_all, table
from why import OWN, PILOT, RATES, SFT, panels, rate

sys.path.insert(0, str(TOY))
from families import read  # noqa: E402
from made import MADE, data, made, problems  # noqa: E402

LENGTHS = ("1 to 3", "4 to 6", "7 to 9", "10 to 12")       # ancestors
GRPO, MENDED = "grpo: a verifier, no teacher", "solutions with mended slips, cross-entropy"
SLIPPING = f"--data {MADE / 'mended_train.jsonl'}"
ARMS = {
    OWN: "opd",
    "own text, forward KL": "opd --divergence forward_kl",
    "teacher's text, reverse KL": "gkd --lmbda 0 --responses teacher --divergence reverse_kl",
    SFT: "sft --responses teacher",
    GRPO: "grpo --teacher none --problems 4 --samples 8",
    MENDED: f"sft {SLIPPING}",
    "solutions with mended slips, reverse KL": f"gkd --lmbda 0 --divergence reverse_kl {SLIPPING}"}
CHOSEN = dict(zip(ARMS, "3e-4 3e-4 3e-4 3e-4 3e-5 3e-4 1e-4".split()))     # by --rates
STUDENTS = "slips", "unseeing"


def with_rates(labels) -> dict[str, str]:
    return {label: f"{ARMS[label]} --lr {CHOSEN[label]}" for label in labels}


def flags(student: str) -> str:
    return (f"--student {MADE}/{student}-{{seed}} --teacher {MADE}/mends-{{seed}} {data('families')} --problems 32 "
            f"--steps 60 --max_new_tokens 100 --eval_every 0 --eval_k 8 --no-eval_teacher --no-token_view "
            f"--verifier number --quiet")


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    problems()
    return {"slips": (with_rates(ARMS), flags("slips")), "unseeing": (with_rates((OWN, SFT)), flags("unseeing"))}


def measured(folder: Path, step: int | None = None) -> dict[str, float]:
    """`taught`, `others`, and each with each of LENGTHS -> share that is right; for the others `wrong` -> share of
    names, `seen` -> share of the wrong ones after which it tries again. step: of an evaluation; None: the last."""
    config = json.loads((folder / "config.json").read_text())
    asked = [json.loads(line) for line in Path(ROOT, config["eval_data"]).read_text().splitlines()]
    right, others = {}, []
    step = config["steps"] if step is None else step
    for line in (folder / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines():
        sample = json.loads(line)
        problem = asked[sample["problem"]]
        found = read(problem["problem"], sample["text"])
        for name in (problem["kind"], f"{problem['kind']} {LENGTHS[(problem['ancestors'] - 1) // 3]}"):
            right.setdefault(name, []).append(found.right)
        if problem["kind"] == "others":
            others.append(found)
    names, slips, seen = (sum(getattr(one, what) for one in others) for what in ("names", "slips", "seen"))
    return {name: mean(values) for name, values in right.items()} | {"wrong": slips / max(names, 1),
                                                                     "seen": seen / max(slips, 1)}


def show(name: str, folders: dict[str, list[Path]]) -> dict[str, dict[str, list[float]]]:
    """Prints the table; returns row -> measure -> a value for each seed."""
    rows = {"before": [measured(folder, 0) for folder in next(iter(folders.values()))]}
    rows |= {label: [measured(folder) for folder in found] for label, found in folders.items()}
    values = {label: {key: [one[key] for one in found] for key in found[0]} for label, found in rows.items()}
    first = values[next(iter(folders))]
    lines = []
    for label, of in values.items():
        gap = percent(differences(of["others"], first["others"]), "+") if of is not first and label != "before" else ""
        lines.append([label, rate(folders[label][0]) if label in folders else "", percent(of["taught"]),
                      percent(of["others"]), gap, *(percent(of[f"others {length}"]) for length in LENGTHS),
                      percent(of["wrong"]), percent(of["seen"])])
    table([name, "lr", "taught", "others", "against the first arm", *(f"others, {length}" for length in LENGTHS),
           "wrong names", "of them seen"], lines)
    return values


def rates(runs: Path) -> None:
    """The mean over taught and others of each arm at each rate, on the models of the pilot's seed."""
    made(["mends", "slips"], [PILOT])
    arms = {f"{label} {lr}": f"{command} --lr {lr}" for label, command in ARMS.items() for lr in RATES}
    found = run_all(arms, flags("slips"), 1, runs / "rates", PILOT)
    score = {label: measured(folder) for label, (folder,) in found.items()}
    table(["slips", *RATES], [[label, *(f"{(one['taught'] + one['others']) / 2:.1%}" for lr in RATES
                                        for one in [score[f"{label} {lr}"]])] for label in ARMS])


def picture(values: dict[str, dict[str, list[float]]]) -> str:
    """What is right by the number of ancestors. values: of the first table."""
    points = [{length: {row: mean(of[f"{kind} {length}"]) for row, of in values.items()} for length in LENGTHS}
              for kind in ("taught", "others")]
    return panels(("families that it was asked about", "others"), "ancestors", points,
                  [label for label in ARMS if label not in (GRPO, MENDED)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=0, choices=range(1, 6), metavar="N",
                        help="fresh models and one run per arm for each (default: 5)")
    parser.add_argument("--runs", type=Path, default=Path("runs/slips"), help="where the runs are kept")
    parser.add_argument("--picture", type=Path, help="the file to draw to (docs/slips.svg)")
    parser.add_argument("--quick", action="store_true", help="one seed, two arms")
    parser.add_argument("--rates", action="store_true", help="each arm at each learning rate, on the seed for that")
    args = parser.parse_args()
    if args.rates:
        return rates(args.runs)
    seeds = args.seeds or (1 if args.quick else 5)
    students = {"slips": with_rates((OWN, SFT) if args.quick else ARMS)}
    if not args.quick:
        students["unseeing"] = with_rates((OWN, SFT))
    made(["mends", *students], list(range(seeds)))
    found = {student: show(student, run_all(arms, flags(student), seeds, args.runs / student))
             for student, arms in students.items()}
    if args.picture:
        args.picture.write_text(picture(found["slips"]))


if __name__ == "__main__":
    main()
