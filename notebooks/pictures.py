"""Pictures: what opd.ipynb draws, as SVG and HTML, by docs/make_picture.py's lines and words; no further packages.

show() displays a picture in a notebook. Run as a plain program it only keeps it, in `shown`.
"""
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
from make_picture import BLUE, GREY, ORANGE, axis, curve, scale, shares, text  # noqa: E402

try:
    from IPython.display import HTML, display
except ImportError:
    HTML, display = str, lambda picture, **how: None

COLOURS = BLUE, ORANGE, GREY
shown: dict[str, str] = {}      # name -> the picture as it was shown last


def show(name: str, picture: str, again: bool = False) -> None:
    """again: in place of the picture of this name, which stays where it is."""
    shown[name] = picture
    display(HTML(picture), display_id=name, update=again)


def svg(body: list[str], width: int, height: int) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif"><rect width="{width}" height="{height}" fill="#ffffff"/>'
            + "".join(body) + "</svg>")


def bars(names: list[str], **values: list[float]) -> str:
    """One line per name; in it one bar per keyword, to the right of zero, or to the left where it is negative."""
    low, high = min(0.0, *map(min, values.values())), max(0.0, *map(max, values.values()))
    wide = 400 / (high - low)
    zero, step, body = 90 - low * wide, 14 * len(values) + 8, []
    for j, ((title, many), colour) in enumerate(zip(values.items(), COLOURS)):
        body.append(text(90 + 130 * j, 16, title, "start", colour=colour))
        for i, x in enumerate(many):
            y = 28 + step * i + 14 * j
            body += [f'<rect x="{zero + min(x, 0) * wide:.1f}" y="{y}" width="{abs(x) * wide:.1f}" height="12" '
                     f'fill="{colour}"/>', text(500, y + 10, f"{x:.3f}", "start")]
    body += [text(78, 30 + step * i + 7 * len(values), repr(name), "end", 13) for i, name in enumerate(names)]
    return svg(body, 560, 30 + step * len(names))


def token_lines(lines: list[list[tuple[str, str]]]) -> str:
    """HTML: the tokens of each line in boxes. lines: (text, background) of every token."""
    style = "color:#000;border:1px solid #fff;padding:1px 3px"
    boxes = ("".join(f'<span style="background:{colour};{style}">{escape(words)}</span>' for words, colour in line)
             for line in lines)
    drawn = "".join(f'<div style="font-family:monospace;white-space:pre">{line}</div>' for line in boxes)
    return f"<div>{drawn}</div>"


def red(value: float, full: float) -> str:
    """White at 0, red from `full` on."""
    light = round(255 - 160 * min(max(value / full, 0), 1))
    return f"rgb(255,{light},{light})"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """HTML, every cell as it would be typed."""
    def row(words, tag):
        style = "font-family:monospace;text-align:left"
        return "<tr>" + "".join(f'<{tag} style="{style}">{escape(word)}</{tag}>' for word in words) + "</tr>"
    return "<table>" + row(heads, "th") + "".join(row(line, "td") for line in lines) + "</table>"


def curves(lines: dict[str, list[tuple[int, float]]], steps: int) -> str:
    """SVG of the share of held-out problems answered right, over the steps: name -> [(step, share), ...]."""
    left, right = 58, 408
    body = [text((left + right) / 2, 30, "share of the held-out problems answered right", size=13)]
    for (name, found), colour in zip(lines.items(), COLOURS):
        at = [left + (right - left) * step / steps for step, _ in found]
        height = scale([share for _, share in found], 0, 1)
        body += [curve(zip(at, height), colour), *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
                                                   for x, y in zip(at, height)),
                 text(right + 10, height[-1] + 4, f"{name} {found[-1][1]:.0%}", "start", 13, colour)]
    return svg([*axis(left, right, steps), *shares(left, right), *body], 620, 300)
