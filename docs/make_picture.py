"""Make picture: a run's metrics.jsonl as two curves in one SVG file, written by hand, without further packages.

    python train.py --name picture
    python docs/make_picture.py runs/picture                    # docs/run.svg, the picture in README.md
    python docs/make_picture.py runs/picture --out mine.svg

Left: held-out accuracy with its 95 % interval, and the teacher's. Right: reverse KL per token of the step, on a
logarithmic axis. Works for any run whose held-out problems have answers.
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
BLUE, ORANGE, GREY = "#1f6feb", "#d1570a", "#6e7781"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, colour: str = "#24292f") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
            f'{escape(words)}</text>')


def line(x0: float, y0: float, x1: float, y1: float, more: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {more}/>'


def points(pairs) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def curve(pairs, colour: str) -> str:
    return (f'<polyline points="{points(pairs)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round"/>')


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


def accuracy(found: list[dict], key: str, steps: int) -> list[str]:
    """The left panel."""
    left, right = PANELS[0]
    at = [left + (right - left) * record["step"] / steps for record in found]
    mean = scale([record["eval"][key] for record in found], 0, 1)
    low, high = (scale([record["eval"][f"{key}_ci"][side] for record in found], 0, 1) for side in (0, 1))
    drawn = axis(left, right, steps) + [text((left + right) / 2, TOP - 14, f"held-out accuracy ({key})", size=13)]
    drawn += shares(left, right)
    band = points([*zip(at, high), *reversed(list(zip(at, low)))])
    drawn += [f'<polygon points="{band}" fill="{BLUE}" fill-opacity="0.15"/>', curve(zip(at, mean), BLUE)]
    drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{BLUE}"/>' for x, y in zip(at, mean)]
    if teacher := found[0].get("eval_teacher"):
        y = scale([teacher[key]], 0, 1)[0]
        drawn += [line(left, y, right, y, f'stroke="{ORANGE}" stroke-width="1.5" stroke-dasharray="6 4"'),
                  text(left + 10, y + 18, f"teacher {teacher[key]:.1%}", "start", colour=ORANGE)]
    return drawn + [text(at[-1] - 8, mean[-1] + 24, f"student {found[-1]['eval'][key]:.1%}", "end", colour=BLUE)]


def divergence(found: list[dict], steps: int) -> list[str]:
    """The right panel."""
    left, right = PANELS[1]
    value = [(record["step"], record["reverse_kl"]) for record in found if record["reverse_kl"] > 0]
    low = math.floor(math.log10(min(v for _, v in value)))
    high = math.ceil(math.log10(max(v for _, v in value)))
    high += high == low
    drawn = axis(left, right, steps)
    drawn.append(text((left + right) / 2, TOP - 14, "KL(student || teacher), nats per token", size=13))
    for power in range(low, high + 1):
        y = scale([power], low, high)[0]
        drawn += [text(left - 8, y + 4, f"{10.0 ** power:g}", "end"),
                  line(left, y, right, y, f'stroke="{GREY}" stroke-opacity="0.2"')]
    at = [left + (right - left) * step / steps for step, _ in value]
    return [*drawn, curve(zip(at, scale([math.log10(v) for _, v in value], low, high)), BLUE)]


def picture(found: list[dict]) -> str:
    """The SVG of the records of one metrics.jsonl."""
    tested = [record for record in found if "eval" in record]
    stepped = [record for record in found if record.get("reverse_kl") is not None]
    key = next((key for key in tested[0]["eval"] if re.fullmatch(r"avg@\d+", key)), None) if tested else None
    if key is None or not stepped:
        raise ValueError("no run with graded evaluations and a teacher")
    steps = max(record["step"] for record in tested + stepped)
    return drawing(accuracy(tested, key, steps) + divergence(stepped, steps))


def drawing(body: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="Helvetica, Arial, sans-serif">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run folder, such as runs/opd")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "run.svg", help="the file to write")
    args = parser.parse_args()
    try:
        args.out.write_text(picture(records(args.run / "metrics.jsonl")))
    except (OSError, ValueError) as error:
        print(f"error: {args.run}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
