"""Board: what a recipe reaches on four tasks, and what it takes to get there.

    python experiments/board.py "opd --lr 3e-4" iw          # a row each; about a minute a row and task on two cores
    python experiments/board.py "opd --divergence jsd" --tasks pair notations

Claim      None of its own: one measuring stick for every recipe, yours too.
Paper      Those of the recipes (python train.py --help).
Design     Four tasks, 60 steps of 32 responses. `pair`: the default student and teacher. `notations`: a student that
           knows one notation, a teacher that writes four; both skills count (why.py, toy/made.py). `both`: student and
           teacher share two notations. `unreliable`: the default student, a teacher that is wrong in a problem in five.
           A recipe without --lr gets the better of 1e-4 and 3e-4 on each task, on seed 6; seeds 0 to 4 are the row.
Measured   Accuracy after the last step (avg@2 at temperature 1), mean and 95 % t-interval over seeds. The cost of the
           goal, from evaluations every ten steps, interpolated: tokens that were learned from, whoever wrote them, and
           seconds of steps on one thread. Where some seeds do not get there, or begin there, it is the others' cost,
           with their number.
Against    a row that is no better than the first, seed by seed.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from compare import TOY, accuracy_by, cost_to_reach, differences, known, percent, records, run_all, table

sys.path.insert(0, str(TOY))
from made import MADE, data, made, problems  # noqa: E402

STEPS, PILOT, RATES = 60, 6, ("1e-4", "3e-4")
# of a run, at every evaluation: step, kind of problem -> accuracy, tokens so far, seconds of steps so far
Curve = list[tuple[int, dict[str, float], int, float]]


class Task(NamedTuple):
    flags: str
    goal: float | None          # of every kind of held-out problems
    models: list[str] = []      # of toy/made.py


def of_made(student: str, teacher: str) -> str:
    return f"--student {MADE}/{student}-{{seed}} --teacher {MADE}/{teacher}-{{seed}} {data('times')}"


TASKS = {
    "pair": Task("", 0.95),
    "notations": Task(of_made("one", "notations4"), 0.95, ["one", "notations4"]),
    "both": Task(of_made("both", "notations2"), 0.9, ["both", "notations2"]),
    "unreliable": Task(f"--teacher {TOY / 'teacher_unreliable'}", None)}
COMMON = (f"--problems 32 --steps {STEPS} --eval_every 10 --eval_k 2 --verifier number --no-eval_teacher "
          f"--no-token_view --quiet")
GROUPS = "--problems 4 --samples 8"
ROWS = ("opd", "opd --divergence policy_gradient --advantage opd", "minillm", "sft --responses teacher",
        f"grpo --teacher none {GROUPS}", "topk", "lsm", "eopd", "fire", "tip", "reopold", "exopd", "gkd",
        *(f"{recipe} {GROUPS}" for recipe in ("sg", "opdvr", "kdrl", "uni", "scope")),
        "iw", "power", "vopd", "tropd", "veto", "topd", "lightning", "opsa --teacher none")


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    problems()
    return {name: ({row: row for row in ROWS}, f"{task.flags} {COMMON}") for name, task in TASKS.items()}


def points(folder: Path) -> Curve:
    found, tokens, seconds = [], 0, 0.0
    for record in records(folder):
        if "eval" in record:
            right = accuracy_by(folder, lambda problem: problem.get("kind", "all"), record["step"])
            found.append((record["step"], right, tokens, seconds))
        else:
            tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
    return found


def mean(right: dict[str, float]) -> float:
    return sum(right.values()) / len(right)


def costs(found: Curve, goal: float) -> tuple[float, float]:
    """(tokens, seconds) until the worst kind of problems reaches the goal; infinite if it does not, and if it was there
    before the first step."""
    if min(found[0][1].values()) >= goal:
        return float("inf"), float("inf")
    return tuple(cost_to_reach([(step, min(right.values()), (tokens, seconds)[what])
                                for step, right, tokens, seconds in found], goal) for what in (0, 1))


def priced(spent: list[tuple[float, float]]) -> list[str]:
    """Tokens and seconds, of the seeds that got there, with their number where it is not all."""
    return [known(list(column), form) for column, form in zip(zip(*spent), (",.0f", ".1f"))]


def with_rate(row: str, task: Task, runs: Path) -> str:
    """The row with the learning rate that was best for it, by the mean over kinds, on the seed for that."""
    if "--lr" in row:
        return row
    arms = {f"{row} --lr {rate}": f"{row} --lr {rate}" for rate in RATES}
    found = run_all(arms, f"{task.flags} {COMMON}", 1, runs / "rates", PILOT)
    return max(arms, key=lambda label: mean(points(found[label][0])[-1][1]))


def row_on(row: str, name: str, seeds: int, runs: Path) -> tuple[str, list[Path]]:
    """(command, its finished runs)."""
    task = TASKS[name]
    command = with_rate(row, task, runs / name)
    return command, run_all({command: command}, f"{task.flags} {COMMON}", seeds, runs / name)[command]


def reached(curves: list[Curve]) -> str:
    """One share, or one for each kind of problems."""
    last = [found[-1][1] for found in curves]
    return " / ".join(percent([right[kind] for right in last]) for kind in sorted(last[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="*", default=ROWS, help="a recipe, or a quoted recipe with flags (default: those "
                                                              "of docs/board.md)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="task", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/board"), help="where the runs are kept")
    args = parser.parse_args()
    for name in args.tasks:
        made(TASKS[name].models, [*range(args.seeds), PILOT])
        rows, plain = [], None
        for row in args.rows:
            command, folders = row_on(row, name, args.seeds, args.runs)
            curves = [points(folder) for folder in folders]
            ends = [mean(found[-1][1]) for found in curves]
            plain = plain or ends
            cells = [f"`{command}`", reached(curves), percent(differences(ends, plain), "+") if rows else ""]
            if TASKS[name].goal:
                cells += priced([costs(found, TASKS[name].goal) for found in curves])
            rows.append(cells)
            print(f"{name}: {command} {cells[1]}", file=sys.stderr, flush=True)
        goal = [f"tokens to {TASKS[name].goal:.0%}", "seconds"] if TASKS[name].goal else []
        table([name, "reached", f"against {rows[0][0]}", *goal], rows)


if __name__ == "__main__":
    main()
