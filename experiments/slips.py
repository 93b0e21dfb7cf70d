"""Slips: what becomes of a student's slips over a long response, by whose text it learned from.

    python experiments/slips.py                 # seven minutes on two cores, and seven for the models
    python experiments/slips.py --quick         # one seed, two arms: two minutes, models included
    python experiments/slips.py --rates         # the learning rates in this file, on a seed used for nothing else

Claim      Slips add up: one that is left spoils all that follows. In the text of a teacher that does not slip no slip
           is mended, so imitating it teaches nothing about them; on the student's own text the teacher says after
           every slip how to go on. The gap opens with the length of the response.
Paper      DAgger, arXiv:1011.0686 (errors that grow with the square of the length, and linearly on own states); GKD,
           arXiv:2306.13649, names it as its reason. The setting is ours.
Design     The world of families (toy/families.py): a student that names a wrong parent in a case out of five and sees
           three of ten of these slips, a teacher that knows all parents and mends. 60 steps of 32 responses to problems
           about two families (`taught`; the same 24 problems are tested). Tested too: two `others`, which no arm is
           trained on, so that it still slips there. Two arms learn from given solutions in which the student's own
           slips are mended: cross-entropy learns to slip from them too, reverse KL to the teacher does not. Then the
           same with a student that sees no slip. The learning rate of each arm is the one of RATES with the best mean
           of both kinds on the models of another seed, those of the second student are those of the first.
Measured   Responses of which every ancestor is right (8 each to 48 problems, temperature 1), by the number of
           ancestors. Among the others, of all names up to the first slip that is left: the share of slips, that of
           slips that are left; of the slips, the share that is seen.
Against    the arms as far apart for one to three ancestors as for more; reverse KL on mended slips no better than on
           the teacher's text.
"""
import json
import sys
from pathlib import Path
from statistics import mean

from compare import ROOT, TOY, differences, percent, run_all, table
from why import GRPO, OWN, PILOT, SFT, panels, parser_for, rate, try_rates

sys.path.insert(0, str(TOY))
from families import read  # noqa: E402
from made import MADE, data, made, problems  # noqa: E402

RATES = "3e-5", "1e-4", "3e-4", "1e-3"
EACH, LENGTHS = 3, ("1 to 3", "4 to 6", "7 to 9", "10 to 12")       # ancestors, three numbers of them each
MEASURES = ("taught", "others", *(f"others {length}" for length in LENGTHS), "slips", "seen", "left")
FORWARD, MENDED = "own text, forward KL", "solutions with mended slips, cross-entropy"
SLIPPING = f"--data {MADE / 'mended_train.jsonl'}"
ARMS = {
    OWN: "opd",
    FORWARD: "opd --divergence forward_kl",
    "teacher's text, reverse KL": "gkd --lmbda 0 --responses teacher --divergence reverse_kl",
    SFT: "sft --responses teacher",
    GRPO: "grpo --teacher none --problems 4 --samples 8",
    MENDED: f"sft {SLIPPING}",
    "solutions with mended slips, reverse KL": f"gkd --lmbda 0 --divergence reverse_kl {SLIPPING}"}
CHOSEN = dict(zip(ARMS, "3e-4 3e-4 3e-4 3e-4 1e-4 3e-4 3e-4".split()))     # by --rates
STUDENTS = {"slips": tuple(ARMS), "unseeing": (OWN, FORWARD, SFT)}
QUICK = {"slips": (OWN, SFT)}


def arms(labels: tuple[str, ...]) -> dict[str, str]:
    return {label: f"{ARMS[label]} --lr {CHOSEN[label]}" for label in labels}


def flags(student: str) -> str:
    return (f"--student {MADE}/{student}-{{seed}} --teacher {MADE}/mends-{{seed}} {data('families')} --problems 32 "
            f"--steps 60 --max_new_tokens 100 --eval_every 0 --eval_k 8 --no-eval_teacher --no-token_view "
            f"--verifier number --quiet")


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    problems()
    return {student: (arms(labels), flags(student)) for student, labels in STUDENTS.items()}


def measured(folder: Path, step: int | None = None) -> dict[str, float]:
    """Kind of family, and kind with each of LENGTHS -> share that is right; of the others `slips`, `seen` and `left`
    too (0 where there are none). step: of an evaluation; None: the last."""
    config = json.loads((folder / "config.json").read_text())
    asked = [json.loads(line) for line in Path(ROOT, config["eval_data"]).read_text().splitlines()]
    right, others = {}, []
    step = config["steps"] if step is None else step
    for line in (folder / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines():
        sample = json.loads(line)
        problem = asked[sample["problem"]]
        found = read(problem["problem"], sample["text"])
        for name in (problem["kind"], f"{problem['kind']} {LENGTHS[(problem['ancestors'] - 1) // EACH]}"):
            right.setdefault(name, []).append(found.right)
        if problem["kind"] == "others":
            others.append(found)
    names, slips, seen = (sum(getattr(one, what) for one in others) for what in ("names", "slips", "seen"))
    return {name: mean(values) for name, values in right.items()} | {
        "slips": slips / max(names, 1), "seen": seen / max(slips, 1), "left": (slips - seen) / max(names, 1)}


def show(name: str, folders: dict[str, list[Path]]) -> dict[str, dict[str, list[float]]]:
    """Prints what each row reaches, and by how much it differs from the first arm, seed by seed. Returns row -> measure
    -> a value for each seed."""
    rows = {"before": [measured(folder, 0) for folder in folders[OWN]]}
    rows |= {label: [measured(folder) for folder in found] for label, found in folders.items()}
    values = {label: {key: [one[key] for one in found] for key in found[0]} for label, found in rows.items()}
    rates = {label: rate(found[0]) for label, found in folders.items()}
    table([name, "lr", *MEASURES], [[label, rates.get(label, ""), *(percent(of[key]) for key in MEASURES)]
                                    for label, of in values.items()])
    table([f"{name}, against {OWN}", *MEASURES],
          [[label, *(percent(differences(of[key], values[OWN][key]), "+") for key in MEASURES)]
           for label, of in values.items() if label not in ("before", OWN)])
    return values


def rates(runs: Path) -> None:
    """The mean over taught and others of each arm at each rate, on the models of the pilot's seed."""
    made(["mends", "slips"], [PILOT])
    try_rates("slips", ARMS, flags("slips"), runs / "rates", RATES,
              lambda folder: mean(measured(folder)[kind] for kind in ("taught", "others")))


def picture(values: dict[str, dict[str, list[float]]]) -> str:
    """What is right by the number of ancestors. values: of the student `slips`, as `show` returns them."""
    heights = [{length: {row: mean(of[f"{kind} {length}"]) for row, of in values.items()} for length in LENGTHS}
               for kind in ("taught", "others")]
    return panels(("families that it was asked about", "others"), "ancestors", heights,
                  [label for label in ARMS if label not in (GRPO, MENDED)])


def main() -> None:
    parser = parser_for(__doc__, "slips", "the file to draw to (docs/slips.svg)", "one seed, two arms")
    args = parser.parse_args()
    if args.picture and args.quick:
        parser.error("--picture draws all arms: not with --quick")
    if args.rates:
        return rates(args.runs)
    students, seeds = (QUICK, args.seeds or 1) if args.quick else (STUDENTS, args.seeds or 5)
    made(["mends", *students], list(range(seeds)))
    found = {student: show(student, run_all(arms(labels), flags(student), seeds, args.runs / student))
             for student, labels in students.items()}
    if args.picture:
        args.picture.write_text(picture(found["slips"]))


if __name__ == "__main__":
    main()
