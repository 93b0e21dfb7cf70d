"""Page: a run as report.html, one file that any browser shows without a network.

    python -m support.page runs/opd                     # writes runs/opd/report.html again
    python -m support.page runs/opd runs/sft runs/grpo --out compared.html

Written at every evaluation and at the end of a run. The numbers come from metrics.jsonl, the coloured tokens from
tokens/ (extras/token_view.py). Several runs share axes; runs that differ in --seed alone become one line with a band.

What a model wrote stands in the page as data and never as markup: no character of it can end the script that holds it,
the page makes text nodes of it, and only the page's own script may run (its hash is in the content security policy).
"""
import argparse
import base64
import hashlib
import json
import math
import re
import sys
from pathlib import Path

from support.errors import UserError, shown
from support.run_folder import is_run, write_text

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 300            # of a curve; longer ones become the means of as many groups of steps
QUARTERS = "reverse_kl", "student_entropy", "teacher_entropy", "overlap_ratio", "advantage", "weight"
CURVES = ("loss", "reverse_kl", "forward_kl", "overlap_ratio", "student_entropy", "teacher_entropy", "mean_length",
          "truncation_rate", "reward", "grad_norm", "sampler_gap", "advantage", "kept", "importance_ratio",
          "strict_coverage", "busiest_expert", "repetition_rate", "seconds")      # page.html draws each of these
ALIKE = {"seed", "name", "runs"}        # settings in which the runs of one line may differ


def records(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a line that a kill has cut is left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict)]


def evaluations(found: list[dict]) -> list[tuple[int, dict]]:
    """(step, metrics) of every evaluation of the student among these records, in order."""
    return sorted({record["step"]: record["eval"] for record in found if "eval" in record}.items())


def number(x) -> float | None:
    """Five digits; None for what is no number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        return None
    return float(f"{x:.5g}")


def thinned(steps: list[int], values: list[float | None]) -> list[list]:
    """[[step, value], ...] without gaps, at most POINTS of them."""
    pairs = [(step, value) for step, value in zip(steps, values) if value is not None]
    size = -(-len(pairs) // POINTS) or 1
    groups = [pairs[i:i + size] for i in range(0, len(pairs), size)]
    return [[group[-1][0], number(sum(value for _, value in group) / len(group))] for group in groups]


def read_run(path: Path) -> dict:
    """What the page shows of a run."""
    if not is_run(path) or not (path / "metrics.jsonl").is_file():
        raise UserError(f"{shown(path)} is no folder of a run with a metrics.jsonl; name one that train.py made")
    found = records(path / "metrics.jsonl")
    config = next((record["config"] for record in found if "config" in record), {})
    steps = {record["step"]: record for record in found if "loss" in record}       # a step taken again counts once
    teacher = next((record["eval_teacher"] for record in found if record.get("eval_teacher")), None)
    order, evals = sorted(steps), evaluations(found)
    names = [*CURVES, *(f"{name}/q{n}" for name in QUARTERS for n in range(1, 5))]
    series = {name: thinned(order, [number(steps[step].get(name)) for step in order]) for name in names}
    summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").is_file() else {}
    return {"name": path.resolve().name, "config": config, "series": {name: xy for name, xy in series.items() if xy},
            "evals": evals, "teacher": teacher, "steps": order[-1] if order else 0,
            "phases": phases(steps.values(), [metrics for _, metrics in evals]),
            "memory": [summary.get("planned_memory"), summary.get("peak_memory")], "seconds": summary.get("seconds"),
            "tokens": views(path / "tokens")}


def phases(steps, evals) -> dict[str, float]:
    """Seconds by phase."""
    found = {name: sum(step.get(f"{name}_seconds", 0.0) for step in steps) for name in ("rollout", "score", "update")}
    found["evaluation"] = sum(metrics.get("seconds", 0.0) for metrics in evals)
    return {name: number(seconds) for name, seconds in found.items()}


def views(folder: Path) -> list[dict]:
    """What extras/token_view.py has kept, in the order of the steps."""
    found = []
    for file in sorted(folder.glob("step-*.json")) if folder.is_dir() else ():
        try:
            found.append(json.loads(file.read_text()))
        except ValueError:
            continue
    return found


def lines(runs: list[dict]) -> list[list[int]]:
    """Runs that differ in their seed alone stand for one line."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        key = json.dumps({key: value for key, value in run["config"].items() if key not in ALIKE}, sort_keys=True)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def page(runs: list[dict]) -> str:
    """The whole file."""
    data = json.dumps({"runs": runs, "lines": lines(runs)}, separators=(",", ":"), ensure_ascii=True)
    for sign in "<>&":      # nothing in it can end the element that holds it
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    text = TEMPLATE.read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text.replace("SCRIPT_HASH", f"sha256-{digest}", 1).replace('"DATA"', data, 1)


def write_page(folder: Path) -> None:
    """report.html of the run in this folder."""
    write_text(folder / "report.html", page([read_run(folder)]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m support.page", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs, such as runs/opd")
    parser.add_argument("--out", type=Path, help="file to write; by default report.html of a single run")
    args = parser.parse_args(argv)
    try:
        out = args.out or args.run[0] / "report.html"
        if len(args.run) > 1 and not args.out:
            raise UserError("several runs: say where the page goes, --out compared.html")
        found = [read_run(path) for path in args.run]
        if not out.parent.is_dir():
            raise UserError(f"the folder {shown(out.parent)} does not exist; make it, or choose another --out")
        write_text(out, page(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written {out}, {out.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
