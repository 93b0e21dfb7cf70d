"""Pictures: the drawings of the pages beside this file, computed by the project's own functions on the toy pair.

    python docs/pictures.py                 # all of them: docs/rows.svg, docs/gradients.svg, docs/chunks.svg
    python docs/pictures.py rows

    rows        responses of the student, side by side, and which of their tokens are rows of the step
    gradients   where each divergence moves the probabilities of a few words, from the same p and q
    chunks      one text in the tokens of two tokenizers, and what they have in common
    report      not drawn but taken: a part of runs/sg/report.html in Chromium, as docs/report.png
"""
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from make_picture import BLUE, GREY, INK, ORANGE, WIDTH, drawing, line, text  # noqa: E402

import losses  # noqa: E402
from extras.cross_tokenizer.align import Bridge  # noqa: E402
from rollout import generate  # noqa: E402
from support.problems import load_problems  # noqa: E402
from support.settings import TOY  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

CELL = 19           # width of a token
MONO = 'font-family="Menlo, Consolas, monospace" font-size="12" text-anchor="middle"'


def box(x: float, y: float, words: str, fill: str, opacity: float, width: float = CELL, ink: str = INK) -> str:
    shown = "■" if words.startswith("<") else words
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1.5:.1f}" height="19" rx="2" fill="{fill}" '
            f'fill-opacity="{opacity}"/><text x="{x + width / 2 - 0.75:.1f}" y="{y + 14:.1f}" {MONO} fill="{ink}">'
            f'{escape(shown)}</text>')


def rows() -> str:
    """Prompt grey, response blue with the number of its row, padding empty."""
    tokenizer, model = Tokenizer(TOY + "student"), load_model(TOY + "student")
    problems = [problem for problem in load_problems(TOY + "train.jsonl") if "*" not in problem.prompt][:4]
    rollout = generate(model, [tokenizer.prompt_ids(problem.prompt) for problem in problems], max_new_tokens=26,
                       stop_ids=tokenizer.stop_ids, seed=6)
    drawn, row, left = [], 0, 60
    for b in range(len(problems)):
        y = 46 + 52 * b
        drawn.append(text(left - 10, y + 14, f"b = {b}", "end"))
        for t in range(rollout.tokens_BT.shape[1]):
            x, inside = left + CELL * t, bool(rollout.mask_BT[b, t])
            if t >= int(rollout.prompt_len_B[b] + rollout.length_B[b]):
                drawn.append(box(x, y, "", GREY, 0.06))
                continue
            piece = tokenizer.decode([int(rollout.tokens_BT[b, t])], skip_special=False)
            drawn.append(box(x, y, piece, BLUE if inside else GREY, 0.25))
            if inside:
                drawn.append(text(x + CELL / 2 - 1, y + 32, str(row), size=9, colour=BLUE))
                row += 1
    words = (f"tokens_BT of four sequences; blue: mask_BT, the student's own tokens, numbered as the N = {row} rows of "
             f"the step; ■ a control token")
    return drawing([text(left, 26, words, "start"), *drawn], 46 + 52 * len(problems))


WORDS = ("seven", "eight", "nine", "ten", "many", "few")
P = (0.50, 0.30, 0.12, 0.05, 0.02, 0.01)        # the student
Q = (0.10, 0.62, 0.02, 0.02, 0.21, 0.03)        # the teacher
SHOWN = {"reverse_kl": {}, "forward_kl": {}, "jsd": {}, "skewed_forward_kl": {}, "skewed_reverse_kl": {},
         "topk_reverse_kl": dict(topk=3, topk_form="tail")}


def downhill(name: str, **knobs) -> torch.Tensor:
    """Minus the gradient of the divergence on the student's logits: which words it raises and which it lowers."""
    logits_1V = torch.tensor([P], dtype=torch.float64).log().requires_grad_()
    rows_ = losses.Rows(logits_1V.log_softmax(-1), torch.tensor([0]), torch.tensor([Q], dtype=torch.float64).log())
    losses.DIVERGENCES[name](rows_, losses.LossArgs(**knobs)).sum().backward()
    return -logits_1V.grad[0]


def gradients() -> str:
    drawn, panel = [], WIDTH / 4
    bars = [("p student, q teacher", None)] + [(name, downhill(name, **knobs)) for name, knobs in SHOWN.items()]
    for number, (name, values) in enumerate(bars):
        x0, y0 = 14 + panel * (number % 4), 20 + 210 * (number // 4)
        drawn += [text(x0 + panel / 2 - 14, y0, name, size=13),
                  line(x0, y0 + 95, x0 + panel - 30, y0 + 95, f'stroke="{GREY}" stroke-opacity="0.6"')]
        step = (panel - 30) / len(WORDS)
        for i, word in enumerate(WORDS):
            x = x0 + step * i
            if values is None:
                pairs = ((P[i], BLUE, 2), (Q[i], ORANGE, step / 2))
            else:
                share = (values[i] / values.abs().max()).item()
                pairs = ((share / 1.6, BLUE if share > 0 else ORANGE, step / 4),)
            for value, colour, shift in pairs:
                height = 120 * abs(value)
                top = y0 + 95 - height if value > 0 else y0 + 95
                drawn.append(f'<rect x="{x + shift:.1f}" y="{top:.1f}" width="{step / 2 - 3:.1f}" '
                             f'height="{height:.1f}" fill="{colour}" fill-opacity="0.8"/>')
            drawn.append(f'<text transform="translate({x + step / 2 + 3:.1f},{y0 + 186:.1f}) rotate(-60)" '
                         f'font-size="10" fill="{INK}">{word}</text>')
    return drawing(drawn, 430)


def chunks() -> str:
    """Two rows of boxes; boxes of one chunk lie above each other and share a colour."""
    student, teacher = Tokenizer(TOY + "student"), Tokenizer(TOY + "teacher_bpe")
    bridge = Bridge(student, teacher)
    problem = load_problems(TOY + "test.jsonl", limit=3)[2]
    ids = student.encode(problem.solution) + [student.stop_ids[0]]
    reading = bridge.read(ids, True, bridge.opened(teacher.prompt_ids(problem.prompt)))
    drawn = [text(14, 24, f"the answer to {problem.prompt} in the student's tokens (above) and in those of "
                          f"toy/teacher_bpe; boxes of one colour and place are a chunk", "start")]
    sides = (student, ids, reading.student_chunk, 44), (teacher, reading.ids, reading.teacher_chunk, 84)
    every = {*reading.student_chunk, *reading.teacher_chunk}
    width = {c: CELL * max(side[2].count(c) for side in sides) for c in every}
    for tokenizer, tokens, chunk, y in sides:
        x = 14.0
        for token, c in zip(tokens, chunk):
            each = width[c] / chunk.count(c)
            single = all(side[2].count(c) == 1 for side in sides)
            piece = tokenizer.decode([token], skip_special=False)
            drawn.append(box(x, y, piece, BLUE if single else ORANGE, 0.25, each))
            x += each
    drawn.append(text(14, 130, "blue: one token on both sides, a whole distribution beside it; orange: a chunk of "
                               "several, whose log-ratio is shared out", "start"))
    return drawing(drawn, 148)


def report() -> None:
    """A copy of the page, whose content security policy knows one script more: it presses the buttons."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    source = HERE.parent / "runs/sg/report.html"
    if not browser or not source.is_file():
        raise SystemExit("error: report needs Chromium and runs/sg (python train.py --recipe sg --name sg)")
    press = ("for (const b of document.querySelectorAll('button')) if (b.textContent === 'step 1') b.click();"
             "const s = document.querySelector('select[aria-label=\"colour by\"]'); s.value = 'advantage';"
             "s.dispatchEvent(new Event('change'));"
             "document.querySelectorAll('.said')[1].querySelectorAll('.t')[0].click();"
             "for (const e of [...document.body.querySelectorAll('main > *')]) if (e.textContent === 'Tokens') "
             "while (e.previousElementSibling) e.previousElementSibling.remove();")
    text = source.read_text()
    own = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    text = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", text, count=1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text.replace(own, own + press, 1))
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
                        "--hide-scrollbars", "--window-size=900,760", "--virtual-time-budget=3000",
                        f"--screenshot={HERE / 'report.png'}", f"file://{copy}"], check=True, capture_output=True)


PICTURES = {"rows": rows, "gradients": gradients, "chunks": chunks}


def main(names: list[str]) -> int:
    if names == ["report"]:
        report()
        return 0
    if wrong := [name for name in names if name not in PICTURES]:
        print(f"error: {wrong[0]} is no picture; there are {', '.join(PICTURES)}", file=sys.stderr)
        return 2
    for name in names or PICTURES:
        (HERE / f"{name}.svg").write_text(PICTURES[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
