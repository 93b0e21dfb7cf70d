r"""Where the answer stands in a text that marks none by a box or ####.

Candidates are numbers, calculations (`6 * 7`) and mathematics between $...$, $$...$$, \(...\) and \[...\]. The answer
is what follows `final answer is`, else `answer:`, else `answer`; where several of one kind do, the last of them.
Without these words it is the last candidate.

What counts as a candidate is math-verify's choice: the two read the same place or this one reads nothing. So (42), "42"
and x5 hold no number, 5x holds 5, and 12,34 is 12.34. One exception: in `The answer is 7/3.` the full stop ends the
sentence, where that package reads 7/3.0 in floating point. Every repetition is bounded, so time is linear.
"""
import re
from bisect import bisect_left, bisect_right
from operator import itemgetter

# A number stands at the start, after white space or after `=`, maybe bold, maybe money. Thousands may be parted by
# spaces; a comma before other than three digits is a decimal comma.
NUMBER = r"(?:[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?|[0-9]+[.,][0-9]+|[0-9]+|\.[0-9]+)"
CALCULATION = re.compile(
    rf"(?:^|(?<=[\s=]))(?:\*\*)?(?:[$€£¥](-?{NUMBER})|(\(?-?\(?{NUMBER}(?:[\s*/+^()×÷-]{{1,6}}{NUMBER})*\)*))"
    r"(?:\s{0,3}(%|[Pp]ercent|[Pp]ct))?")
ONE_NUMBER, SIGN = re.compile(NUMBER), re.compile(r"[*/+^()×÷-]")
GROUPED = re.compile(r"-?[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?")
GOES_ON = re.compile(r"[eE][-+]?[0-9]|\s?\\(?!text|quad|mathrm)[a-zA-Z]")       # 1e3, 2\pi, 3\frac12
BEFORE_SUM, AFTER_SUM = re.compile(r"[0-9]\.\s{1,3}$"), re.compile(r"[.,:\s)$]|$")      # not `2. 6 * 7`, not `6 * 7b`

SPAN = re.compile(
    r"\$\$((?:\\.|[^$\\]){1,400})\$\$|(?<![\\0-9])\$((?:\\[^\n]|[^\n$\\]){1,400})\$"
    r"|\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)"
    r"|(?<=\s)\[([^\n\]\[]{1,400})\](?=\s)|(-?\\frac\{-?[0-9]+(?:\.[0-9]+)?\}\{-?[0-9]+(?:\.[0-9]+)?\})", re.DOTALL)
SPAN_PERCENT = re.compile(r"\s{0,3}(?:\\?%|[Pp]ercent|[Pp]ct)")
CHAIN = re.compile(r"\s{0,3}(?:,?and|,?or|,)\s{0,3}")                   # $1$ and $2$ are one answer, a list
DIGIT_BEFORE = re.compile(r"[0-9]\s?$")                                 # 3\frac{1}{2} is not \frac{1}{2}
# \[ 5 \text{ cm} \] is 5 times cm to math-verify, for the space behind it.
LOOSE_UNIT = re.compile(r"\S\s*\\(?:text|mathrm|mbox)[a-z]{0,2}\s?\{[^{}]*\}(?:\^\S{1,3})?\s+$")

FINAL = re.compile(r"final answer.{0,100}?\sis:?", re.IGNORECASE)
ANCHORS = (FINAL, re.compile("answer:", re.IGNORECASE), re.compile("answer", re.IGNORECASE))
EQUALS_BEFORE, EQUALS_AFTER = re.compile(r"=(?: {1,100}|=)$"), re.compile(r"\s{0,9}=")

Candidate = tuple[int, int, str | None]         # start, end, and what it says; None: something that is not read


def said(text: str) -> str | None:
    """The answer; None if there is no candidate, "" if it is one that is not read."""
    spans, numbers = math_spans(text), plain_numbers(text)
    if not spans and not numbers:
        return None
    for anchor in ANCHORS:
        if (found := _anchored(text, anchor, spans, numbers)) is not None:
            return found
    return max(spans[-1:] + numbers[-1:], key=lambda c: (c[1], -c[0]))[2] or ""


def said_finally(text: str) -> str | None:
    """What follows `final answer is`, None if nothing does."""
    return _anchored(text, FINAL, math_spans(text), plain_numbers(text)) if FINAL.search(text) else None


def plain_numbers(text: str) -> list[Candidate]:
    found = []
    for match in CALCULATION.finditer(text):
        start, end = match.span()
        content, percent = match[1] or match[2], "%" if match[3] else ""
        numbers = list(ONE_NUMBER.finditer(content))
        apart = not SIGN.search(content, numbers[0].end(), numbers[-1].start())     # no calculation: `in 2020 5 cats`
        if not apart:
            found.append((start, end, _calculation(text, start, end, content)))
        elif content[0] != "(":                                                     # (42), (5 red ones)
            sign = "-" if len(numbers) == 1 and content[0] == "-" else ""
            start += numbers[-1].start() if len(numbers) > 1 else 0
            number = sign + numbers[-1][0]
            number = re.sub("[ ,]", "", number) if GROUPED.fullmatch(number) else number.replace(",", ".")
            found.append((start, end, None if GOES_ON.match(text, end) else number + percent))
    return found


def _calculation(text: str, start: int, end: int, content: str) -> str | None:
    content = re.sub(r"\^-([0-9]+)", r"^{-\1}", content.replace("**", "^"))
    if GOES_ON.match(text, end) or not AFTER_SUM.match(text, end) or BEFORE_SUM.search(text[max(start - 5, 0):start]):
        return None
    return content


def math_spans(text: str) -> list[Candidate]:
    found = []
    for match in SPAN.finditer(text):
        start, end = match.span()
        inner = next(filter(None, match.groups()))
        content = inner.strip()
        if content.endswith((".", ",")):
            continue
        if LOOSE_UNIT.search(inner) or match[6] and DIGIT_BEFORE.search(text[max(start - 2, 0):start]):
            content = None
        elif percent := SPAN_PERCENT.match(text, end):
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
    """What the `anchor` whose answer ends last points to: None if nothing, "" if something that is not read."""
    best = (-1, None)
    for match in anchor.finditer(text):
        end = match.end()
        if anchor is FINAL:                     # right behind it
            near = [c for c in _after(spans, end, 3)[:1] + _after(numbers, end, 1)[:1] if not text[end:c[0]].strip()]
        else:                                   # mathematics within 50 characters; in the line the number behind the
            line = text.find("\n", end, end + 110)                          # last ` = `, else the first within 50
            there = [c for c in _after(numbers, end, 101) if line < 0 or c[0] <= line + 1]
            equals = [c for c in there if EQUALS_BEFORE.search(text[end:c[0]])]
            first = [c for c in there if c[0] <= end + 51 and (c[2] is None or not EQUALS_AFTER.match(text, c[1]))]
            near = _after(spans, end, 50)[:1] + (equals[-1:] or first[:1])
        best = max([best, *((c[1], c[2] or "") for c in near)], key=itemgetter(0))
    return best[1]
