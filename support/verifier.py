r"""The verifier: where the answer stands in a response, and whether it is the right one.

Grading = extraction (find the answer in the text), then equality of values (support/answers.py): linear in the length
of the text, nothing executed. `auto` is held to math-verify 0.9, and tests/attack/verifier.py compares the two.
"""
import re
from operator import itemgetter

from support.answers import canonical, same
from support.errors import UserError
from support.prose import CHAIN, math_spans, plain_numbers, said, said_finally

__all__ = ["VERIFIERS", "canonical", "extract", "grade", "marked"]
VERIFIERS = ("auto", "boxed", "hash", "number", "exact", "math-verify")

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([-+]?[0-9][0-9.,/]*))")        # MATH also writes \boxed 2
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)                                  # \{ is one token, not a brace
HASH = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
NUMBER = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
LAST_NUMBER = re.compile(rf"((?:(?<![\w)\]}}])[-+])?{NUMBER}(?: ?/ ?{NUMBER})?)(?: ?\\?%)?")  # 5-3 ends in 3
# The toy's notation (toy/make.py): digits and signs without a space, `1*2=2#2` or `#2`. Every other lone # is prose.
TOY = re.compile(r"[0-9+*=?#;|-]+")
TOY_HASH = re.compile(r"(?<!#)(?:####|#(?=[^\s#]))(?!#)([^\n#]*)")
BETWEEN = re.compile(r"\b(?:and|or)\b|[,;]")


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _content(text: str, box: re.Match) -> tuple[str | None, int]:
    """What stands in a box, and where the box ends; None where its brace never closes or it is empty."""
    if box[1]:
        return box[1], box.end()
    depth = 1
    for token in BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[box.end():token.start()].strip() or None, token.end()
    return None, len(text)


def _boxes(text: str) -> str | None:
    """The last box, and those before it that belong to the same answer, as a list: \\boxed{1} and \\boxed{2}."""
    boxes = list(BOX.finditer(text))
    last, end = _content(text, boxes[-1])
    if (after := said_finally(text[end:])) is not None:
        return after or None
    found, start = [last], boxes[-1].start()
    for box in reversed(boxes[:-1][-6:]):
        content, end = _content(text, box)
        if end > start or last is None or content is None:      # nested, or never closed
            break
        between = text[end:start]
        if "$" in between or "\\" in between:
            joined = CHAIN.fullmatch(re.sub(r"\$|\\[\])(\[]", "", between))
        else:
            joined = len(between) < 10 or len(between) < 70 and content != found[0] and BETWEEN.search(between)
        if not joined:
            break
        if content != found[0]:
            found.insert(0, content)
        start = box.start()
    return last and ", ".join(found)


def marked(text: str) -> str | None:
    """The answer that a worked solution marks by \\boxed{} or ####, None if it marks none."""
    return extract(text, "boxed") or extract(text, "hash")


def _auto(text: str) -> str | None:
    if "\\boxed" in text and BOX.search(text):
        return _boxes(text)
    if TOY.fullmatch(text):
        match = _last(TOY_HASH, text) or _last(LAST_NUMBER, text)
        return match[1] if match and LAST_NUMBER.fullmatch(match[1]) else None
    if mark := _last(HASH, text):               # an answer begins right there; `#### Step 3` is a heading
        line = mark[1].strip()
        first = min(math_spans(line) + plain_numbers(line), key=itemgetter(0, 1), default=None)
        if first and not line[:first[0]].strip("*$"):
            return first[2]
    found = said(text)
    if found is None and not re.search("[0-9]", text):
        return text.strip() or None
    return found or None


def extract(text: str, verifier: str = "auto") -> str | None:
    """The answer as it stands in a response, None if there is none. Where a verifier looks: see grade()."""
    if verifier in ("auto", "math-verify"):
        return _auto(text)
    if verifier == "boxed":
        box = _last(BOX, text)
        return box and _content(text, box)[0]
    if verifier == "hash":
        match = _last(HASH, text)
        return match and match[1].strip() or None
    if verifier == "number":
        match = _last(LAST_NUMBER, text.replace("\N{MINUS SIGN}", "-"))
        return match and match[1]               # without its percent sign
    return text.strip() or None


def grade(text: str, answer: str | tuple[str, ...], verifier: str = "auto") -> bool:
    """True if the response `text` gives `answer` (of several, any). A response without one is wrong, never an error.

    Where a verifier looks:
      boxed        the last \\boxed{} or \\fbox{}, braces balanced; one that never closes is no answer
      hash         after the last ####, to the end of the line (GSM8K)
      number       the last number in the text, a/b being one number; on both sides units and % do not count
      exact        the whole text: the answer to the character, white space at the ends aside
      auto         the last \\boxed{}, or several that `and` or a comma joins; else after the last ####, if an answer
                   begins there; else in the prose (support/prose.py): the first number, calculation or $...$ after
                   the word answer, or the last of the text; else the whole text, to the character, if it has no digit.
                   A lone # marks an answer in the toy's notation only (`1*2=2#2`)
      math-verify  that package decides (pip install math-verify)

    What is equal, exact and math-verify aside: see support/answers.py. `auto` is meant never to call right what
    math-verify calls wrong, so it errs towards wrong; compare only runs that one verifier graded. Three exceptions,
    where that package knows no mark: the toy's notation, #### with more text behind it, and a word alone (Paris). A
    fourth: a fraction at the end of a sentence (`It is 7/3.`), which it takes for a decimal, 7/3.0.
    """
    if verifier not in VERIFIERS:
        raise UserError(f"unknown verifier {verifier!r}: choose from {', '.join(VERIFIERS)}")
    if isinstance(answer, tuple):
        return any(grade(text, one, verifier) for one in answer)
    truth = marked(answer) or answer
    if verifier == "math-verify":
        try:
            from math_verify import parse, verify
        except ImportError:
            raise UserError("the verifier math-verify is not installed: pip install math-verify") from None
        return bool(verify(parse(f"\\boxed{{{truth}}}"), parse(text)))
    found = extract(text, verifier)
    if found is None or verifier == "exact":
        return found is not None and found == answer.strip()
    if verifier == "auto" and found == text.strip() and not re.search("[0-9]", found):
        return found == truth.strip()
    if verifier == "number":
        truth = extract(truth, "number") or truth
    return same(truth, found)
