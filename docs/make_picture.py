"""Make picture: runs as curves and a few coloured responses, in one SVG file, written by hand, without more packages.

    python train.py --name opd && python train.py --recipe sft --name sft && python train.py --recipe grpo --name grpo
    python docs/make_picture.py runs/opd runs/sft runs/grpo     # docs/run.svg, the picture in README.md
    python docs/make_picture.py runs/mine --out mine.svg

Left: held-out accuracy, of the first run with its 95 % interval, and its teacher's. Right: reverse KL per token of the
step, on a logarithmic axis. Below: answers to one held-out problem at the first, the middle and the last step of the
first run, each token the darker the farther student and teacher are apart on it. Works for any runs whose held-out
problems have answers; the answers are there if the run kept them (--token_view).
"""
import argparse
import json
import math
import re
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 860, 300
TOP, BOTTOM = 44, 252                       # of both panels
PANELS = (58, 408), (498, 848)              # left and right edge of each
BLUE, ORANGE, GREY, INK = "#1f6feb", "#d1570a", "#6e7781", "#24292f"
COLOURS = BLUE, "#1a7f37", "#8250df", "#0a7d8c"
CHARACTER, ROW = 8.2, 28                    # width of a letter, height of a row of the answers


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, colour: str = "#24292f") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
            f'{escape(words)}</text>')


def line(x0: float, y0: float, x1: float, y1: float, more: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {more}/>'


def points(pairs) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def curve(pairs, colour: str, dashes: str = "") -> str:
    more = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (f'<polyline points="{points(pairs)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round"{more}/>')


def axis(left: float, right: float, most: float, label: str = "step") -> list[str]:
    """The frame of a panel, and up to seven round numbers from 0 to `most` below it."""
    unit = 10 ** math.floor(math.log10(max(most, 1)))
    unit = next(size for size in (unit / 5, unit / 2, unit, 2 * unit) if most / size <= 7)
    unit = max(1, round(unit))
    drawn = [f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{BOTTOM - TOP}" fill="none" '
             f'stroke="{GREY}" stroke-opacity="0.5"/>', text((left + right) / 2, BOTTOM + 36, label)]
    return drawn + [text(left + (right - left) * number / most, BOTTOM + 17, str(number))
                    for number in range(0, int(most) + 1, unit)]


def shares(left: float, right: float) -> list[str]:
    """The upright axis of a panel of shares, 0 to 100 %."""
    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = scale([share], 0, 1)[0]
        drawn += [text(left - 8, y + 4, f"{share:.0%}", "end"),
                  line(left, y, right, y, f'stroke="{GREY}" stroke-opacity="0.2"')]
    return drawn


def scale(values, low: float, high: float) -> list[float]:
    return [BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low) for value in values]


def accuracy(runs: list[tuple[str, list[dict]]], key: str, steps: int) -> list[str]:
    """The left panel: (name, evaluations) of each run."""
    left, right = PANELS[0]
    drawn = axis(left, right, steps) + [text((left + right) / 2, TOP - 14, f"held-out accuracy ({key})", size=13)]
    drawn += shares(left, right)
    for number, (name, found) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        at = [left + (right - left) * record["step"] / steps for record in found]
        mean = scale([record["eval"][key] for record in found], 0, 1)
        if number == 0:
            low, high = (scale([record["eval"][f"{key}_ci"][side] for record in found], 0, 1) for side in (0, 1))
            band = points([*zip(at, high), *reversed(list(zip(at, low)))])
            drawn.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>')
        drawn += [curve(zip(at, mean), colour)]
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in zip(at, mean)]
        drawn.append(text(right - 10, BOTTOM - 12 - 17 * (len(runs) - 1 - number),
                          f"{name} {found[-1]['eval'][key]:.1%}", "end", colour=colour))
    if teacher := runs[0][1][0].get("eval_teacher"):
        y = scale([teacher[key]], 0, 1)[0]
        drawn += [line(left, y, right, y, f'stroke="{ORANGE}" stroke-width="1.5" stroke-dasharray="6 4"'),
                  text(left + 10, y + 18, f"teacher {teacher[key]:.1%}", "start", colour=ORANGE)]
    return drawn


def divergence(runs: list[list[dict]], steps: int) -> list[str]:
    """The right panel: the steps of each run."""
    left, right = PANELS[1]
    value = [[(record["step"], record["reverse_kl"]) for record in found if record["reverse_kl"] > 0] for found in runs]
    every = [v for pairs in value for _, v in pairs]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    high += high == low
    drawn = axis(left, right, steps)
    drawn.append(text((left + right) / 2, TOP - 14, "KL(student || teacher), nats per token", size=13))
    for power in range(low, high + 1):
        y = scale([power], low, high)[0]
        drawn += [text(left - 8, y + 4, f"{10.0 ** power:g}", "end"),
                  line(left, y, right, y, f'stroke="{GREY}" stroke-opacity="0.2"')]
    for number, pairs in enumerate(value):
        at = [left + (right - left) * step / steps for step, _ in pairs]
        if pairs:
            drawn.append(curve(zip(at, scale([math.log10(v) for _, v in pairs], low, high)),
                               COLOURS[number % len(COLOURS)]))
    return drawn


def answers(views: list[dict]) -> list[str]:
    """A row for each kept step: its answer to the held-out problem that the last one answers at greatest length."""
    samples = [view["held-out"] for view in views]
    number = max(range(len(samples[-1])), key=lambda i: (bool(samples[-1][i]["right"]), len(samples[-1][i]["pieces"])))
    rows, y = [], HEIGHT + 16
    for view, kept in zip(views, samples):
        sample, x = kept[number], PANELS[0][0] + 96
        rows.append(text(PANELS[0][0] + 84, y, f"step {view['step']}", "end"))
        kls = sample["columns"].get("kl") or [0.0] * len(sample["pieces"])
        shown = [(sample["prompt"], None), *zip(sample["pieces"], kls)]
        for piece, kl in shown:
            width = CHARACTER * len(piece) + 3
            if x + width > PANELS[1][1] - 40:
                rows.append(text(x + 4, y, "...", "start"))
                break
            if kl is not None:
                depth = min(1.0, (kl / 2) ** 0.5)
                rows.append(f'<rect x="{x:.1f}" y="{y - 13}" width="{width - 1:.1f}" height="18" rx="2" '
                            f'fill="{ORANGE}" fill-opacity="{0.06 + 0.64 * depth:.2f}"/>')
            rows.append(f'<text x="{x + 1:.1f}" y="{y}" font-family="Menlo, Consolas, monospace" font-size="13" '
                        f'fill="{GREY if kl is None else INK}" textLength="{width - 3:.1f}">{escape(piece)}</text>')
            x += width + 8 * (kl is None)
        verdict = {1: "right", 0: "wrong"}.get(sample["right"])
        if verdict:
            rows.append(text(PANELS[1][1], y, verdict, "end", colour=GREY))
        y += ROW
    return rows


def picture(runs: list[tuple[str, list[dict]]], views: list[dict] = ()) -> str:
    """The SVG of (name, records of metrics.jsonl) of each run and the first one's views of tokens."""
    tested = [(name, [record for record in found if "eval" in record]) for name, found in runs]
    stepped = [[record for record in found if record.get("reverse_kl") is not None] for _, found in runs]
    first = tested[0][1]
    key = next((key for key in first[0]["eval"] if re.fullmatch(r"avg@\d+", key)), None) if first else None
    if key is None or not stepped[0] or any(not found or key not in found[0]["eval"] for _, found in tested):
        raise ValueError("no runs with graded evaluations of the same kind, and a teacher in the first")
    steps = max(record["step"] for found in [*(found for _, found in tested), *stepped] for record in found)
    names = ["student"] if len(runs) == 1 else [name for name, _ in runs]
    body = accuracy([(name, found) for name, (_, found) in zip(names, tested)], key, steps) + divergence(stepped, steps)
    views = [view for view in views if view.get("held-out")]
    return drawing(body + (answers(views) if views else []), HEIGHT + (ROW * len(views) + 10) * bool(views))


def drawing(body: list[str], height: int = HEIGHT) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif">\n<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, nargs="+", help="run folders, such as runs/opd")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "run.svg", help="the file to write")
    args = parser.parse_args()
    try:
        kept = [json.loads(file.read_text()) for file in sorted((args.run[0] / "tokens").glob("step-*.json"))]
        args.out.write_text(picture([(run.name, records(run / "metrics.jsonl")) for run in args.run], kept))
    except (OSError, ValueError) as error:
        print(f"error: {args.run[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
