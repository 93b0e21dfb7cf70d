"""Compare: run several settings over several seeds, print one table with 95 % intervals.

    python experiments/compare.py --seeds 5 opd fire sg topk grpo sft -- --steps 60
    python experiments/compare.py --seeds 3 opd "opd --lr 1e-3" "gkd --beta 0.1"

Each row is a recipe and its flags; flags after -- go to every row. Runs go two at a time on two cores with one
thread each (runs/compare/...), finished ones are not repeated. `at equal tokens` is the accuracy, interpolated
between evaluations, at the moment when the row had generated as many student tokens as the row that generated
fewest in all. `teacher tokens` are those that a teacher scored or wrote: given solutions are neither.

The other scripts of this folder are built from the functions here: an arm is a label and a command line, a seed
makes it a run, and an interval is over seeds.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Iterable

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
PROGRAM = ROOT / "train.py"     # a script with losses of its own puts itself here, and takes the same command lines
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support.checkpoint import recorded  # noqa: E402
from support.extras import offers  # noqa: E402
from support.flags import parse  # noqa: E402
from support.setup import Run, needs_teacher, set_up  # noqa: E402
from support.start import NOT_THE_RUN  # noqa: E402

# t(0.975, n - 1)
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# Statistics

def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval over seeds); the width of a single value is NaN."""
    n = len(values)
    half = STUDENT_T[n] * float(np.std(values, ddof=1)) / n ** 0.5 if n > 1 else float("nan")
    return float(np.mean(values)), half


def percent(values: list[float], sign: str = "") -> str:
    """`96.5% ± 0.2%`; with sign "+", for differences, `+1.5% ± 0.2%`."""
    mean, half = interval(values)
    return f"{mean:{sign}.1%} ± {half:.1%}" if half == half else f"{mean:{sign}.1%}"


def number(values: list[float], form: str = ".2f") -> str:
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:{form}}" if half == half else f"{mean:{form}}"


def known(values: list[float], form: str = ".2f") -> str:
    """`number` of the seeds that have a finite one, and how many they are where some have none; `-` where all do."""
    there = [value for value in values if np.isfinite(value)]
    if not there:
        return "-"
    return number(there, form) + (f" ({len(there)} of {len(values)})" if len(there) < len(values) else "")


def columns(rows: Iterable) -> list[list]:
    """[(a, b), (c, d), ...] -> [[a, c, ...], [b, d, ...]]: one list per measure instead of one per seed."""
    return [list(column) for column in zip(*rows)]


def differences(values: list[float], baseline: list[float]) -> list[float]:
    """Seed by seed: both share problems and the noise of the evaluation, so this is narrower than two
    intervals."""
    return [a - b for a, b in zip(values, baseline, strict=True)]


def cost_to_reach(points: list[tuple], target: float) -> float:
    """What had been spent when the accuracy first reaches `target`, interpolated between two evaluations; infinite
    if it never does. points: (step, accuracy, spent so far, ...), such as curve returns them with tokens."""
    for (_, low, start, *_), (_, high, end, *_) in zip([points[0], *points], points):
        if high >= target:
            return start if low >= target else start + (end - start) * (target - low) / (high - low)
    return float("inf")


# Runs

def arguments(command: str, flags: str, seed: int, folder: Path) -> list[str]:
    """train.py's command line for one run in `folder`; {seed} in a flag is this run's seed."""
    recipe, *own = shlex.split(f"{command} ".replace("{seed}", str(seed)))
    return ["--recipe", recipe, *shlex.split(flags.replace("{seed}", str(seed))), *own, "--seed", str(seed),
            "--runs", str(folder.parent), "--name", folder.name]


def slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9.]+", "_", text).strip("_")


def finished(folder: Path, line: list[str]) -> bool:
    """Has exactly this run ended? (train.py would find that too, after loading torch, hundreds of times.)"""
    if not (folder / "summary.json").exists():
        return False
    wanted = asdict(parse(line, train.SETTINGS)[0])
    found = recorded(json.loads((folder / "config.json").read_text()))
    return found == recorded({key: value for key, value in wanted.items() if key not in NOT_THE_RUN})


def run(label: str, command: str, flags: str, seed: int, runs: Path) -> Path:
    """Run one arm with one seed; return its folder. The same call again finds the finished run."""
    folder = runs / f"{slug(label)}-{seed}"
    if finished(folder, arguments(command, flags, seed, folder)):
        return folder
    line = [sys.executable, str(PROGRAM), *arguments(command, flags, seed, folder)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{shlex.join(line)}\n{done.stderr[-2000:]}")
    return folder


def run_all(arms: dict[str, str], flags: str, seeds: int, runs: Path, first: int = 0) -> dict[str, list[Path]]:
    """label -> its finished runs, one per seed from `first` on. arms: label -> recipe and flags."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {label: [pool.submit(run, label, command, flags, first + seed, runs) for seed in range(seeds)]
                for label, command in arms.items()}
        try:
            return {label: [job.result() for job in found] for label, found in jobs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def ready(line: list[str]) -> Run:
    """What train.py would train with this command line, loaded and not yet begun. What it says on the way goes to
    standard error: the tables are alone on standard output."""
    with redirect_stdout(sys.stderr):
        run = set_up(parse(line, train.SETTINGS)[0], {})
        train.defaults(run)
        for attach in offers("attach"):
            attach(run)
    return run


# What runs have left

def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def accuracy_key(folder: Path) -> str:
    """avg@k with the k of this run."""
    return next(key for key in summary(folder)["after"] if re.fullmatch(r"avg@\d+", key))


def curve(folder: Path) -> list[tuple[int, float, int, int]]:
    """(step, accuracy, student tokens so far, teacher tokens so far) at every evaluation. The teacher's
    tokens are those that it scored, and of those that it wrote the ones that passed the filter."""
    cfg = train.Config(**json.loads((folder / "config.json").read_text()))
    file = folder / "teacher_responses.json"
    wrote = json.loads(file.read_text()).values() if file.exists() else ()
    points, tokens, teacher = [], 0, sum(len(response) for responses in wrote for response in responses)
    for record in records(folder):
        if "eval" in record:
            points.append((record["step"], record["eval"][accuracy_key(folder)], tokens, teacher))
        else:
            tokens += record["tokens"] * record["on_policy"]
            # a verifier reads alone, and solutions that came with the data need no teacher either
            taught = needs_teacher(cfg) or cfg.lmbda < 1 and cfg.responses == "teacher"
            teacher += record["tokens"] * (taught and record["step"] > cfg.cold_start_steps)
    return points


def accuracy_by(folder: Path, kind: Callable[[dict], str], step: int | None = None) -> dict[str, float]:
    """kind of problem -> accuracy on the held-out problems of this kind, at one evaluation (None: the last).
    kind is a function of a problem's record."""
    config = json.loads((folder / "config.json").read_text())
    problems = [json.loads(line) for line in Path(ROOT, config["eval_data"]).read_text().splitlines()]
    files = sorted((folder / "samples").glob("step-*.jsonl"))
    file = files[-1] if step is None else folder / "samples" / f"step-{step:06d}.jsonl"
    return mean_by(kind, problems, [json.loads(line) for line in file.read_text().splitlines()])


def mean_by(kind: Callable[[dict], str], problems: list[dict], samples: list[dict]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for sample in samples:
        right.setdefault(kind(problems[sample["problem"]]), []).append(sample["correct"])
    return {name: float(np.mean(found)) for name, found in right.items()}


# Tables

def table(header: list[str], rows: list[list[str]]) -> None:
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")
    print(flush=True)


def options(doc: str, name: str, seeds: int, quick: str = "") -> argparse.Namespace:
    """--seeds and --runs, for the scripts that take nothing else; --quick where it says what that leaves."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=seeds, choices=range(1, max(STUDENT_T) + 1), metavar="N",
                        help=f"runs per arm, for the intervals (default: {seeds})")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="where the runs are kept")
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="+", help="a recipe, or a quoted recipe with flags")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[:own.index("--")], own[own.index("--") + 1:]
    args = parser.parse_args(own)
    found = run_all({row: row for row in args.rows}, shlex.join(flags), args.seeds,
                    args.runs / (slug(" ".join(flags)) or "defaults"))
    curves = {row: [curve(folder) for folder in folders] for row, folders in found.items()}
    budget = min(points[-1][2] for row in curves.values() for points in row if points[-1][2])
    rows = []
    for row, points in curves.items():
        seconds = [summary(folder)["seconds"] for folder in found[row]]
        equal = [float(np.interp(budget, [p[2] for p in one], [p[1] for p in one])) for one in points]
        last = [one[-1] for one in points]
        rows.append([f"`{row}`", f"{np.mean([one[0][1] for one in points]):.1%}", percent([p[1] for p in last]),
                     percent(equal) if any(p[2] for p in last) else "-", f"{np.mean([p[2] for p in last]):,.0f}",
                     f"{np.mean([p[3] for p in last]):,.0f}", f"{np.mean(seconds):.0f}"])
    key = accuracy_key(found[args.rows[0]][0])
    table(["recipe", f"{key} before", "after", f"at equal tokens ({budget:,})", "student tokens", "teacher tokens",
           "seconds"], rows)


if __name__ == "__main__":
    main()
