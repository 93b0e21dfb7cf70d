"""Compare: run several settings over several seeds, print one table with 95 % intervals.

    python experiments/compare.py --seeds 5 opd fire sg topk grpo sft -- --steps 60
    python experiments/compare.py --seeds 3 opd "opd --lr 1e-3" "gkd --beta 0.1"

Each row is a recipe and its flags; flags after -- go to every row. Runs go two at a time with one thread each
(runs/compare/...), finished ones are not repeated. `at equal tokens` is the accuracy, interpolated between
evaluations, at the moment when the row had generated as many student tokens as the row that generated fewest
in all.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}   # t(0.975, n - 1)


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval over seeds)."""
    n = len(values)
    return float(np.mean(values)), STUDENT_T[n] * float(np.std(values, ddof=1)) / n ** 0.5 if n > 1 else float("nan")


def run(row: str, flags: list[str], seed: int, runs: Path) -> Path:
    """Run one row with one seed; return its folder. The same call again finds the finished run."""
    recipe, *own = shlex.split(row)
    name = f"{row} {' '.join(flags)} {seed}".translate(str.maketrans({c: "_" for c in " /={}|"}))
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", recipe, *flags, *own, "--seed", str(seed),
               "--runs", str(runs), "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return runs / name


def curve(folder: Path, key: str) -> list[tuple[int, float, int, int]]:
    """(step, accuracy, student tokens so far, tokens the teacher read so far) at every evaluation."""
    points, tokens, read = [], 0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        if "eval" in record:
            points.append((record["step"], record["eval"][key], tokens, read))
        else:
            tokens += record["tokens"] * record["on_policy"]
            read += record["tokens"]
    return points


def run_all(rows: list[str], flags: list[str], seeds: int, runs: Path) -> dict[str, list[Path]]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {row: [pool.submit(run, row, flags, seed, runs) for seed in range(seeds)] for row in rows}
        return {row: [job.result() for job in found] for row, found in jobs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="+", help="a recipe, or a quoted recipe with flags")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[:own.index("--")], own[own.index("--") + 1:]
    args = parser.parse_args(own)
    folders = run_all(args.rows, flags, args.seeds, args.runs)
    key = next(k for k in json.loads((folders[args.rows[0]][0] / "summary.json").read_text())["after"] if k.startswith("avg@")
               and not k.endswith("_ci"))
    curves = {row: [curve(folder, key) for folder in found] for row, found in folders.items()}
    budget = min(points[-1][2] for found in curves.values() for points in found if points[-1][2])
    print(f"| recipe | {key} before | after | at equal tokens ({budget:,}) | student tokens | teacher tokens "
          f"| seconds |\n"
          + "|---" * 7 + "|")
    for row, found in curves.items():
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders[row]]
        after = interval([points[-1][1] for points in found])
        equal = interval([float(np.interp(budget, [p[2] for p in points], [p[1] for p in points])) for points in found])
        print(f"| `{row}` | {np.mean([points[0][1] for points in found]):.1%} | {after[0]:.1%} ± {after[1]:.1%} | "
              f"{equal[0]:.1%} ± {equal[1]:.1%} | {np.mean([points[-1][2] for points in found]):,.0f} | "
              f"{np.mean([points[-1][3] for points in found]):,.0f} | "
              f"{np.mean([s['seconds'] for s in summaries]):.0f} |")


if __name__ == "__main__":
    main()
