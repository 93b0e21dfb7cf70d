"""Why on-policy: what is learned from whose text, where a teacher does not write as the student does.

    python experiments/why.py                   # a quarter of an hour on two cores, and ten minutes for the models
    python experiments/why.py --quick           # one seed, two arms of two lessons: two minutes, models included
    python experiments/why.py --sweeps          # where each gap vanishes
    python experiments/why.py --rates           # the learning rates in this file, on a seed used for nothing else

Claim      1. A teacher's text teaches its notation together with its knowledge. On the student's own text it can only
           say what is right there, and the student keeps what it knew; a divergence that seeks modes (reverse KL) is
           content with one notation, one that covers them (forward KL) wants all.
           2. A student that knows two notations, both of them the teacher's, is better off with credit that reaches the
           first sign, since only there one can be chosen.
           3. Where a right answer is hardly ever found a verifier is silent, and a teacher is not.
           4. A student ruined by imitation is brought back by its own text.
Paper      None: the reasons that GKD (2306.13649), MiniLLM (2306.08543) and Thinking Machines give for being on-policy.
Design     Models of toy/made.py, fresh ones for each seed. The teachers are right and write each calculation in one
           of N notations, all equally often. Steps of 32 responses to problems with a `*`, which the student knows
           less well (new skill); calculations without one (old skill) are only tested. 60 steps; 3: 90 steps of 64,
           and a response is right if its whole calculation is. The learning rate of each arm is that of 3e-5, 1e-4
           and 3e-4 with the best mean of both skills on the models of another seed (N = 8 and other widths: those of
           N = 4; other lengths: those of N = 1). In 3 that rule chooses rates at which nothing moves (`rare, smaller
           steps`, with the sweeps); all at 3e-4 was added after that was seen. Students of 3 whose share of right
           answers begins at 1 to 6 % are trained again with more evaluations: how many times faster opd is than grpo.
Measured   avg@4 at temperature 1 on 128 held-out problems of each kind; share of responses in the student's first
           notation.
Against    1: at N = 4 imitation of the teacher's text as good as the student's own; both directions of the KL alike.
           2: opd as good as minillm. 3: grpo as good as opd. 4: no return within 60 steps.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Callable, NamedTuple

from board import points
from compare import ROOT, TOY, accuracy_by, columns, cost_to_reach, differences, known, percent, run_all, slug, table

sys.path[:0] = [str(TOY), str(ROOT / "docs")]
from made import DIGITS, MADE, SEEN, WIDTHS, data, made, notation, problems  # noqa: E402
from make_picture import (BOTTOM, COLOURS, GREY, HEIGHT, ORANGE, PANELS, TOP, curve, drawing,  # noqa: E402
                          scale, shares, text)

PILOT, RATES = 6, ("3e-5", "1e-4", "3e-4")
OWN = "opd: own text, reverse KL"
SFT = "sft: teacher's text, cross-entropy"
GRPO = "grpo: a verifier, no teacher"


class Lesson(NamedTuple):
    arms: dict[str, str]        # label -> recipe and its flags
    flags: str
    models: list[str]           # of toy/made.py


def lesson(student: str, teacher: str, arms: dict[str, str], steps: int = 60, kind: str = "times",
           more: str = "") -> Lesson:
    """student: a name of toy/made.py, or a path with {seed}."""
    names = [name for name in (student, teacher) if "/" not in name]
    student = student if "/" in student else f"{MADE}/{student}-{{seed}}"
    flags = (f"--student {student} --teacher {MADE}/{teacher}-{{seed}} {data(kind)} --problems 32 --steps {steps} "
             f"--eval_every 0 --eval_k 4 --no-eval_teacher --no-token_view --verifier number --quiet {more}")
    return Lesson(arms, flags, names)


HANDS = {
    OWN: "opd",
    "own text, forward KL": "opd --divergence forward_kl",
    "teacher's text, reverse KL": "gkd --lmbda 0 --responses teacher --divergence reverse_kl",
    SFT: "sft --responses teacher"}
BOTH = {
    OWN: "opd",
    "own text, forward KL": "opd --divergence forward_kl",
    "sampled policy gradient": "opd --divergence policy_gradient --advantage opd",
    "minillm: credit to the first token": "minillm",
    SFT: "sft --responses teacher"}
READ = "--min_coverage 0 --max_dropped 0.05"     # two of a hundred responses hold what the teacher has no token for
WORDS = {
    "xtok: own text, credit per chunk": f"xtok {READ}",
    SFT: f"sft --responses teacher {READ}"}
RARE = {
    OWN: "opd --problems 8 --samples 8",
    GRPO: "grpo --teacher none --problems 8 --samples 8",
    SFT: "sft --responses teacher --problems 64"}
# the arms that follow a student whose share of right answers begins in NOW_AND_THEN: a verifier has four times as long
FASTER = {label: f"{RARE[label]} --lr 3e-4 --steps {steps}" for label, steps in ((OWN, 90), (GRPO, 360))}
NOW_AND_THEN, GOALS = (0.01, 0.065), (0.2, 0.4)
RARE_STUDENTS = [f"seen{percent}" for percent in SEEN]
RUINED = {
    OWN: "opd", SFT: "sft --responses teacher",
    "FiRe's loss, all responses": "fire --weight none",
    "FiRe's loss and filter": "fire --fire_alpha 0 --fire_beta 0",
    "a random fifth of the tokens less": "fire --weight random --keep 0.8"}
RUINING = {"sft at 1e-4": "sft --responses teacher --lr 1e-4"}
CHOSEN = {      # by --rates, arm by arm; N = 8 has those of N = 4
    "N = 1": "3e-4 3e-4 3e-4 3e-4", "N = 2": "3e-4 3e-5 1e-4 3e-5", "N = 4": "3e-4 3e-5 3e-5 3e-5",
    "N = 8": "3e-4 3e-5 3e-5 3e-5", "N = 4, other tokens": "1e-4 3e-5",
    "knows both": "1e-4 3e-5 1e-4 1e-4 3e-5", "rare": "3e-5 3e-5 3e-4",
    "ruined": "3e-4 3e-4 3e-4 3e-4 3e-4"}


def at(name: str, arms: dict[str, str]) -> dict[str, str]:
    """The arms of a lesson, each with its learning rate."""
    return {label: f"{command} --lr {rate}" for (label, command), rate in zip(arms.items(), CHOSEN[name].split())}


def rare(student: str, arms: dict[str, str] | None = None) -> Lesson:
    arms = arms or {label: f"{command} --lr 3e-4" for label, command in RARE.items()}
    return lesson(student, "notations1", arms, steps=90, kind="only", more="--verifier exact")


def lessons(runs: Path) -> dict[str, Lesson]:
    ruined = f"{runs.resolve()}/{slug('N = 4, larger steps')}/{slug(*RUINING)}-{{seed}}/last"
    hands = at("N = 4", HANDS)
    return {
        "N = 1": lesson("one", "notations1", at("N = 1", HANDS)), "N = 4": lesson("one", "notations4", hands),
        "N = 4, as many FLOPs": lesson("one", "notations4", {SFT: hands[SFT]}, steps=75),
        "N = 4, larger steps": lesson("one", "notations4", RUINING),
        "knows both": lesson("both", "notations2", at("knows both", BOTH)),
        "rare": rare("seen2"),
        "ruined": lesson(ruined, "notations4", at("ruined", RUINED))}


def sweeps() -> dict[str, Lesson]:
    smaller = dict(list(at("rare", RARE).items())[:2])      # the third chose 3e-4
    one, four = ({label: at(name, HANDS)[label] for label in (OWN, SFT)} for name in ("N = 1", "N = 4"))
    return {
        **{f"N = {count}": lesson("one", f"notations{count}", at(f"N = {count}", HANDS))
           for count in (1, 2, 4, 8)},
        "N = 4, four times as long": lesson("one", "notations4", four, steps=240),
        "N = 4, other tokens": lesson("one", "words4", at("N = 4, other tokens", WORDS)),
        **{f"N = 4, width {width}": lesson(f"width{width}", "notations4", four) for width in WIDTHS},
        "rare, smaller steps": rare("seen2", smaller),
        "rare": rare("seen2"), **{f"seen{percent}": rare(f"seen{percent}") for percent in SEEN[1:]},
        **{f"{digits} digits": lesson(f"digits{digits}", f"teacher{digits}", one, kind=f"times{digits}",
                                      more=f"--max_new_tokens {6 * digits}") for digits in DIGITS}}


def followed(student: str) -> Lesson:
    """`rare` with the arms of FASTER and an evaluation every ten steps."""
    found = rare(student, FASTER)
    return found._replace(flags=f"{found.flags} --eval_every 10 --eval_k 2")


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    problems()
    found = lessons(runs) | sweeps() | {f"{student} followed": followed(student) for student in RARE_STUDENTS}
    return {name: (one.arms, one.flags) for name, one in found.items()}


def measured(folder: Path, step: int | None = None) -> tuple[float, float, float]:
    """(new skill, old skill, share of responses whose first sign is of the first notation) at the evaluation of a step;
    None: the last."""
    skill = accuracy_by(folder, lambda problem: problem["kind"], step)
    file = max((folder / "samples").glob("*.jsonl")) if step is None else folder / f"samples/step-{step:06d}.jsonl"
    first = [notation(json.loads(line)["text"]) == 0 for line in file.read_text().splitlines()]
    return skill["new"], skill["old"], sum(first) / len(first)


def run_lesson(name: str, found: Lesson, seeds: int, runs: Path, first: int = 0) -> dict[str, list[Path]]:
    return run_all(found.arms, found.flags, seeds, runs / slug(name), first)


def show(name: str, folders: dict[str, list[Path]]) -> dict[str, tuple[float, float]]:
    """Prints the table, with differences seed by seed; returns the mean skills of each row."""
    first = next(iter(folders))
    every = {"before": [measured(folder, 0) for folder in folders[first]]}
    every |= {label: [measured(folder) for folder in found] for label, found in folders.items()}
    rows = []
    for label, values in every.items():
        new, old, notations = columns(values)
        was_new, was_old, _ = columns(every["before"])
        cells = [percent(new), percent(differences(new, was_new), "+"),
                 percent(differences(new, columns(every[first])[0]), "+"), percent(old),
                 percent(differences(old, was_old), "+"), percent(notations)]
        empty = {"before": (1, 2, 4), first: (2,)}.get(label, ())
        rows.append([label, rate(folders[label][0]) if label in folders else "",
                     *("" if place in empty else cell for place, cell in enumerate(cells))])
    table([name, "lr", "new skill", "against before", "against the first arm", "old skill", "against before",
           "in its first notation"], rows)
    return {label: tuple(sum(column) / len(column) for column in columns(values)[:2])
            for label, values in every.items()}


def found_now_and_then(folders: dict[str, dict[str, list[Path]]]) -> list[tuple[str, int]]:
    """(student, seed) of those of the lessons on rare answers that begin in NOW_AND_THEN. folders: lesson -> its
    runs."""
    low, high = NOW_AND_THEN
    return [(student, seed) for student, name in zip(RARE_STUDENTS, ("rare", *RARE_STUDENTS[1:]))
            for seed, folder in enumerate(folders[name][OWN]) if low <= measured(folder, 0)[0] <= high]


def faster(students: list[tuple[str, int]], runs: Path) -> None:
    """Prints what it takes a teacher and a verifier to get these students to the same shares of right answers."""
    rows, times = [], {}
    for student, seed in students:
        folders = run_lesson(f"{student} followed", followed(student), 1, runs, seed)
        both = [points(folder) for (folder,) in folders.values()]
        cells = [f"{student}, seed {seed}", f"{both[0][0][1]['new']:.1%}"]
        for goal in GOALS:
            spent = [[cost_to_reach([(step, right["new"], cost[what]) for step, right, *cost in found], goal)
                      for found in both] for what in (0, 1)]
            for (teacher, verifier), form in zip(spent, (",.0f", ".1f")):
                times.setdefault((goal, form), []).append(verifier / teacher)
                cells.append(f"{teacher:{form}} / {verifier:{form}} = {verifier / teacher:.1f}")
        ends = [measured(folder) for (folder,) in folders.values()]
        rows.append([*cells, *(" / ".join(f"{skills[which]:.1%}" for skills in ends) for which in (0, 1))])
    rows.append(["times as much", "", *(known(found, ".1f") for found in times.values()), "", ""])
    table(["opd / grpo", "begins at", *(f"{what} to {goal:.0%}" for goal in GOALS for what in ("tokens", "seconds")),
           "ends at", "old skill"], rows)


def rate(folder: Path) -> str:
    return f"{json.loads((folder / 'config.json').read_text())['lr']:.0e}".replace("e-0", "e-")


def rates(runs: Path) -> None:
    """The mean of both skills of each arm at each rate, on the models of the pilot's seed."""
    here = lessons(runs) | sweeps()
    made(sorted({model for name in CHOSEN for model in here[name].models}), [PILOT])
    run_lesson("N = 4, larger steps", here["N = 4, larger steps"], 1, runs, PILOT)      # `ruined` goes on from it
    for name in (name for name in CHOSEN if name != "N = 8"):
        arms = {label: command.rpartition(" --lr ")[0] for label, command in here[name].arms.items()}
        try_rates(name, arms, here[name].flags, runs / "rates" / slug(name), RATES,
                  lambda folder: sum(measured(folder)[:2]) / 2)


def try_rates(name: str, arms: dict[str, str], flags: str, runs: Path, rates: tuple[str, ...],
              score: Callable[[Path], float]) -> None:
    """Prints the score of each arm at each rate, on the models of the pilot's seed. arms: as yet without a rate."""
    tried = {f"{label} {lr}": f"{command} --lr {lr}" for label, command in arms.items() for lr in rates}
    found = run_all(tried, flags, 1, runs, PILOT)
    table([name, *rates], [[label, *(f"{score(*found[f'{label} {lr}']):.1%}" for lr in rates)] for label in arms])


def panels(titles: tuple[str, str], below: str, heights: list[dict[str, dict[str, float]]], arms) -> str:
    """Two panels of shares with a curve for each arm, and what was before, dashed. heights: for each panel, place on
    its lower axis -> arm or `before` -> share."""
    colours = (*COLOURS, ORANGE)[:len(arms)]
    drawn, lines = [], [*zip(arms, colours, [""] * len(arms), strict=True), ("before", GREY, "6 4")]
    for (left, right), title, found in zip(PANELS, titles, heights):
        drawn += [f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{BOTTOM - TOP}" fill="none" '
                  f'stroke="{GREY}" stroke-opacity="0.5"/>', text((left + right) / 2, TOP - 14, title, size=13),
                  text((left + right) / 2, BOTTOM + 36, below), *shares(left, right)]
        at = [left + (right - left) * (place + 0.5) / len(found) for place in range(len(found))]
        drawn += [text(x, BOTTOM + 17, name) for x, name in zip(at, found)]
        for label, colour, dashes in lines:
            dots = list(zip(at, scale([rows[label] for rows in found.values()], 0, 1)))
            drawn.append(curve(dots, colour, dashes))
            if not dashes:
                drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in dots]
    for place, (label, colour, dashes) in enumerate(lines):
        name = f"{label} (dashed)" if dashes else label
        drawn.append(text(PANELS[place % 2][0], HEIGHT + 14 + 17 * (place // 2), name, "start", colour=colour))
    return drawing(drawn, HEIGHT + 17 * ((len(lines) + 1) // 2) + 8)


def picture(means: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Both skills by the teacher's notations. means: of each table, row -> mean skills."""
    skills = [{str(count): {row: both[which] for row, both in means[f"N = {count}"].items()}
               for count in (1, 2, 4, 8)} for which in (0, 1)]
    return panels(("new skill", "old skill, never trained on"), "notations of the teacher", skills, HANDS)


def parser_for(doc: str, name: str, picture: str, quick: str) -> argparse.ArgumentParser:
    """The flags of a script that makes fresh models for each seed. --seeds is 0 where it is not given. picture, quick:
    what the help says of them."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=0, choices=range(1, 6), metavar="N",
                        help="fresh models and one run per arm for each (default: 5)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="where the runs are kept")
    parser.add_argument("--picture", type=Path, help=picture)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rates", action="store_true", help="each arm at each learning rate, on the seed for that")
    return parser


def main() -> None:
    parser = parser_for(__doc__, "why", "with --sweeps: the file to draw the notations to (docs/why.svg)",
                        "one seed, two arms of two lessons")
    parser.add_argument("--sweeps", action="store_true", help="where each gap vanishes")
    args = parser.parse_args()
    if args.picture and not args.sweeps:
        parser.error("--picture needs --sweeps: it draws N = 1, 2, 4 and 8")
    if args.rates:
        return rates(args.runs)
    chosen = sweeps() if args.sweeps else lessons(args.runs)
    if args.quick:
        few = {"N = 4": (OWN, SFT), "knows both": (OWN, "minillm: credit to the first token")}
        chosen = {name: chosen[name]._replace(arms={label: chosen[name].arms[label] for label in labels})
                  for name, labels in few.items()}
    seeds = args.seeds or (1 if args.quick else 5)
    made(sorted({model for found in chosen.values() for model in found.models}), list(range(seeds)))
    folders, means = {}, {}
    for name, found in chosen.items():
        folders[name] = run_lesson(name, found, seeds, args.runs)
        means[name] = show(name, folders[name])
    if args.sweeps and (students := found_now_and_then(folders)):
        faster(students, args.runs)
    if args.picture:
        args.picture.write_text(picture(means))


if __name__ == "__main__":
    main()
