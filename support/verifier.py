r"""The verifier: where the answer stands in a response, and whether it is the right one.

Grading = extraction (find the answer in the text), then equality of values (support/answers.py). Linear in the length of
the text; nothing is executed. `auto` is held to math-verify 0.9: tests/attack/verifier.py compares the two.
"""
import re
from bisect import bisect_left, bisect_right
from fractions import Fraction
from operator import itemgetter

from support.answers import canonical, same
from support.errors import UserError

__all__ = ["VERIFIERS", "canonical", "extract", "grade", "marked"]
VERIFIERS = ("auto", "boxed", "hash", "number", "exact", "math-verify")

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([-+]?[0-9][0-9.,/]*))")        # MATH also writes \boxed 2
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)                                  # \{ is one token, not a brace
HASH = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
LAST_NUMBER = re.compile(rf"((?:(?<![\w)\]}}])[-+])?{DIGITS}(?: ?/ ?{DIGITS})?)(?: ?\\?%)?")  # 5-3 ends in 3
# The toy's notation (toy/make.py): digits and signs without a space, `1*2=2#2` or `#2`. Every other lone # is prose.
TOY = re.compile(r"[0-9+*=?#;|-]+")
TOY_HASH = re.compile(r"(?<!#)(?:####|#(?=[^\s#]))(?!#)([^\n#]*)")

# Prose, as math-verify reads it: a number stands at the start, after white space or after `=`, maybe bold, maybe money.
# Thousands may be parted by spaces, a comma before other than three digits is a decimal comma.
NUMBER = r"(?:[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?|[0-9]+[.,][0-9]+|[0-9]+|\.[0-9]+)"
PERCENT = r"(?:\s{0,3}(%|[Pp]ercent|[Pp]ct))?"
CALCULATION = re.compile(rf"(?:^|(?<=[\s=]))(?:\*\*)?(?:[$€£¥](-?{NUMBER})|(\(?-?\(?{NUMBER}(?:[\s*/+^()×÷-]{{1,6}}{NUMBER})*\)*))"
                         + PERCENT)
SIGN = re.compile(r"[*/+^()×÷-]")
ONE_NUMBER = re.compile(NUMBER)
GROUPED = re.compile(r"-?[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?")
BEFORE_SUM = re.compile(r"[0-9]\.\s{1,3}$")               # `1. 6 * 7`, a list
AFTER_SUM = re.compile(r"[.,:\s)$]|$")                      # what may follow `6 * 7`
MORE = re.compile(r"[eE][-+]?[0-9]|\s?\\(?!text|quad|mathrm)[a-zA-Z]")   # 1e3, 2\pi, 3\frac12: more than a number
SPAN = re.compile(r"\$\$((?:\\.|[^$\\]){1,400})\$\$|(?<![\\0-9])\$((?:\\[^\n]|[^\n$\\]){1,400})\$|\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)"
                  r"|(?<=\s)\[([^\n\]\[]{1,400})\](?=\s)|(-?\\frac\{-?[0-9]+(?:\.[0-9]+)?\}\{-?[0-9]+(?:\.[0-9]+)?\})", re.DOTALL)
LOOSE_UNIT = re.compile(r"\S\s*\\(?:text|mathrm|mbox)[a-z]{0,2}\s?\{[^{}]*\}(?:\^\S{1,3})?\s+$")    # \[ 5 \text{ cm} \] is 5 times cm to math-verify
SPAN_PERCENT = re.compile(r"\s{0,3}(?:\\?%|[Pp]ercent|[Pp]ct)")
CHAIN = re.compile(r"\s{0,3}(?:,?and|,?or|,)\s{0,3}")       # $1$ and $2$ are one answer
FINAL = re.compile(r"final answer.{0,100}?\sis:?", re.IGNORECASE)
ANCHORS = (FINAL, re.compile("answer:", re.IGNORECASE), re.compile("answer", re.IGNORECASE))
EQUALS = re.compile(r"=(?:[ ]{1,100}|=)$")
NEXT_EQUALS = re.compile(r"\s{0,9}=")
BETWEEN = re.compile(r"\b(?:and|or)\b|[,;]")


Candidate = tuple[int, int, str | None]                     # start, end, and what it says; None: it is not read


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _content(text: str, box: re.Match) -> tuple[str | None, int]:
    """What stands in a box, and where the box ends; None where its brace never closes or holds nothing."""
    if box[1]:
        return box[1], box.end()
    depth = 1
    for token in BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[box.end():token.start()].strip() or None, token.end()
    return None, len(text)


def _boxes(text: str) -> str | None:
    """The last box, or the last ones as a list, where little but `and`, `or` or a comma stands between them."""
    boxes = list(BOX.finditer(text))
    last, end = _content(text, boxes[-1])
    rest = text[end:]
    if FINAL.search(rest) and (said := _anchored(rest, FINAL, _spans(rest), _numbers(rest))) is not None:
        return said or None
    found, start = [last], boxes[-1].start()
    for box in reversed(boxes[:-1][-6:]):
        content, end = _content(text, box)
        between = text[end:start]
        if end > start or last is None or content is None:  # nested, or never closed
            break
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


def _endless(quotient: str) -> bool:
    """Whether it is no finite binary fraction. A dot behind it makes it another number to math-verify: 7/3. is 7/3.0."""
    number = canonical(quotient)
    return not isinstance(number, Fraction) or number.denominator.bit_count() != 1


def _numbers(text: str) -> list[Candidate]:
    """(start, end, number or calculation) for each in the text; None where it goes on as something that is not read."""
    found = []
    for match in CALCULATION.finditer(text):
        money, sum_, percent = match.groups()
        start, content = match.start(), money or sum_
        numbers = list(ONE_NUMBER.finditer(content))
        apart = not SIGN.search(content, numbers[0].end(), numbers[-1].start())
        if apart and content[0] == "(":                     # (42), (5 red ones)
            continue
        if apart:
            sign = "-" if len(numbers) == 1 and content[0] == "-" else ""
            start += numbers[-1].start() if len(numbers) > 1 else 0
            content = sign + numbers[-1][0]
            content = content.replace(",", "").replace(" ", "") if GROUPED.fullmatch(content) else content.replace(",", ".")
        else:
            content = re.sub(r"\^-([0-9]+)", r"^{-\1}", content.replace("**", "^"))
        unread = MORE.match(text, match.end()) or not apart and (
            not AFTER_SUM.match(text, match.end()) or BEFORE_SUM.search(text[max(start - 5, 0):start])
            or ("/" in content or "^{" in content) and text.startswith(".", match.end()) and _endless(content))
        found.append((start, match.end(), None if unread else content + "%" * bool(percent)))
    return found


def _spans(text: str) -> list[Candidate]:
    """(start, end, content) for each piece of mathematics between dollars or brackets, and each \\frac{1}{2}."""
    found = []
    for match in SPAN.finditer(text):
        start, end = match.span()
        content = next(filter(None, match.groups())).strip()
        if match[6] and re.search(r"[0-9]\s?$", text[max(start - 2, 0):start]):
            content = None                                  # 3\frac{1}{2}
        elif content.endswith((".", ",")):
            continue
        elif LOOSE_UNIT.search(next(filter(None, match.groups()))):
            content = None
        if content and (percent := SPAN_PERCENT.match(text, end)):
            end, content = percent.end(), content + "%"
        if found and content and found[-1][2] and CHAIN.fullmatch(text, found[-1][1], start):
            start, _, before = found.pop()
            content = f"{before}, {content}"
        found.append((start, end, content))
    return found


def _after(candidates: list[Candidate], end: int, reach: int) -> list[Candidate]:
    """Those that start within `reach` characters behind `end`."""
    first = bisect_left(candidates, end, key=itemgetter(0))
    return candidates[first:bisect_right(candidates, end + reach, lo=first, key=itemgetter(0))]


def _anchored(text: str, anchor: re.Pattern, spans: list[Candidate], numbers: list[Candidate]) -> str | None:
    """What the last `anchor` with something behind it points to; "" if that is not read."""
    best = (-1, None)
    for match in anchor.finditer(text):
        end = match.end()
        if anchor is FINAL:                                 # right behind `final answer is`
            near = [c for c in _after(spans, end, 3)[:1] + _after(numbers, end, 1)[:1] if not text[end:c[0]].strip()]
        else:                                               # within 50 characters, or the number behind the last ` = `
            near = _after(spans, end, 50)[:1]
            line = text.find("\n", end)
            line = len(text) if line < 0 else line
            there = [c for c in _after(numbers, end, 101) if c[0] <= line + 1]
            equals = [c for c in there if EQUALS.search(text[end:c[0]])]
            first = [c for c in there if c[0] <= end + 51 and (c[2] is None or not NEXT_EQUALS.match(text, c[1]))]
            near += equals[-1:] or first[:1]
        best = max([best, *((c[1], c[2] or "") for c in near)], key=itemgetter(0))
    return best[1]


def _prose(text: str) -> str | None:
    """The answer in a text without marks; None if it holds none, "" if it holds one that is not read."""
    spans, numbers = _spans(text), _numbers(text)
    if not spans and not numbers:
        return None
    for anchor in ANCHORS:
        if (found := _anchored(text, anchor, spans, numbers)) is not None:
            return found
    return max(spans[-1:] + numbers[-1:], key=lambda c: (c[1], -c[0]))[2] or ""


def _auto(text: str) -> str | None:
    if "\\boxed" in text and BOX.search(text):
        return _boxes(text)
    if TOY.fullmatch(text):
        match = _last(TOY_HASH, text) or _last(LAST_NUMBER, text)
        return match and match[1].strip() or None
    if mark := _last(HASH, text):
        line = mark[1].strip()
        first = sorted(_spans(line) + _numbers(line))[:1]
        if first and not line[:first[0][0]].strip("*$"):
            return first[0][2]
    found = _prose(text)
    if found is None:
        return None if re.search("[0-9]", text) else text.strip() or None
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
      auto         in this order: a box, or several that `and` or a comma joins; after the last ####, if an answer begins
                   there; the first number or $...$ after `answer`; the last number, calculation or $...$ of the text;
                   the whole text. A # alone marks an answer only in the toy's notation (`1*2=2#2`)
      math-verify  that package decides (pip install math-verify)

    What is equal (exact and math-verify aside): support/answers.py. `auto` is meant never to call right what math-verify
    calls wrong, so it errs towards wrong. Three exceptions, where that package knows no mark: the toy's notation, #### before
    more text, and a text that is the answer and holds no number, as Paris for Paris. Compare only runs that one verifier
    graded.
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
        return found == truth.strip()           # a word alone, marked by nothing: to the character
    if verifier == "number":
        truth = extract(truth, "number") or truth
    return same(truth, found)
