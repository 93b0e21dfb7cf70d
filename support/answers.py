r"""The value of an answer: what stands in a box, as something that can be compared, hashed and counted.

Two answers are equal where their values are. All are exact, without tolerance:

    number       1,234 = 1234.0 = 1.234\times10^3 = 1.234E3 = 2468/2; 0.5 = \frac12 = 2^{-1}; 3\frac12 = 7/2
    expression   a sum of products of fractions, letters, \pi, roots and powers, multiplied out (support/sums.py):
                 \sqrt{12} = 2\sqrt3, \frac{1}{\sqrt2} = \frac{\sqrt2}{2}, x(x+1) = x+x^2, 1/2x = 1/(2x)
    list         1,2 = 2,1 = \{1,2\} = 1 \text{ and } 2; \pm2 = 2,-2. Order and repetition do not count
    tuple        (1,2), [1,2), (1,2,3): order and brackets count; a pair and an open interval look alike
    union        (0,1)\cup(2,3): order does not count
    equation     x = 5, \theta\approx5, x\in[1,2]: equals the same equation, and for `same` also its right-hand side
    inequality   x < 3 = 3 > x, 1 < x < 2: not solved
    percentage   50\% equals itself, and for `same` also 0.5, and 50 where both are whole
    word         Monday = \text{Monday} = \textbf{monday}; B = (B) = \text{(b)}: letter case does not count
    text         anything else, white space aside: factorials, matrices, times of the day

Read through: $, \$, \left, \right, \displaystyle, thin spaces, quotation marks, bold and roman type, {{3}}, degrees,
and the unit behind an answer: \text{...} whatever it says, else the words of UNITS. So 5 cm = 5 = 5 m.

These are the equalities of math-verify 0.9 as far as they are exact and cheap. What that package misreads stays text,
even where the meaning is plain: 3 1/2 = 7/2, 1 234 = 1234, 1e3 = 1000, `3.` = 3 are all not equal here.
"""
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from support.sums import DEEPEST, LONGEST, Reader, Unread, value_of

UNITS = "|".join("""mm cm dm km m ft inch inches feet yard mile mph kmph kmh kg gm lb gal gallon liter litre acre
    hectare meter metre sec second min minute hr hour day month yr year deg degree cent rupee pound coin apple student
    unit square""".split())
TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox) ?\{([^{}]*)\}"
REWRITES = [(needle, re.compile(pattern), new) for needle, pattern, new in (      # tried only where the needle stands
    ("\\", r"\\(?:left|right|displaystyle|bf|rm)(?![a-zA-Z])|(?<!\\)\\[!()]|\\\$", ""),        # looks
    ("$", r"\$", ""), ('"', '"', ""),
    ("circ", r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})", ""),                                # degrees
    ("\\", r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])", " "),
    ("\N{MINUS SIGN}", "\N{MINUS SIGN}", "-"), ("π", "π", r"\\pi "),
    ("≤", "≤", r"\\le "), ("<=", "<=", r"\\le "), (r"\le", r"\\leq?(?:slant)?(?![a-zA-Z])", r"\\le "),
    ("≥", "≥", r"\\ge "), (">=", ">=", r"\\ge "), (r"\ge", r"\\geq?(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\ne", r"\\neq?(?![a-zA-Z])", r"\\ne "),
    (r"\cdot", r"\\cdot(?![a-zA-Z])", "*"), (r"\times", r"\\times(?![a-zA-Z])", "*"),
    (r"\div", r"\\div(?![a-zA-Z])", "/"),
    ("{", r"\{ ?, ?\}", ","),                                                  # 1{,}234 is LaTeX for 1,234
    ("%", r"\s?\\?%", "%"), ("percent", r"\s?\\text\{percent\}|(?<=[0-9])\s?percent$", "%"),
    ("frac", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    ("frac", r"\\frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"), ("frac", r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
    ("sqrt", r"\\sqrt ?([0-9a-zA-Z])", r"\\sqrt{\1}"))]
UNIT = re.compile(rf"(?<=[0-9}}]) [gsh]$|(?:(?<=[0-9}}])|(?<=\\pi)) ?(?:(?:sq|square|cubic) )?(?:{UNITS})(?:s|es)?$")
TEXT_START = re.compile(r"\\(?:text|math)(?:bf|it|rm)?(?![a-zA-Z])|\\mbox")
ENDS_IN_BRACE = re.compile(r"\}(?:\^[0-9]|\^?\{[0-9]\})?$")
LAST_TEXT = re.compile(rf"{TEXT}(?:\^[0-9]|\^?\{{[0-9]\}})?$")
# What math-verify takes for a unit as well, although it may be a letter of the expression or a word of the text.
SWALLOWED = re.compile(r"(?<!\\)sqrt|[0-9} ](?:[tholcsgmd]|ab|bc|by|rd|lt|st|mt|mp|rs|cc|am|pm|th)(?:e?s)?$|"
                       r"[a-z] (?:more|less|men|man|way|number|ratio|prime|edge|digit|gain|loss|rise|increase|decrease|"
                       rf"{UNITS})(?:e?s)?$")
WHOLE = re.compile(TEXT)
AND = re.compile(r",? ?\\text ?\{ ?(?:and|or) ?\}|,?(?:^| )(?:and|or)(?= )")
NUMBER = re.compile(r"[-+]? ?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:E[-+]?[0-9]{1,9})?|\.[0-9]+)")
THOUSANDS = re.compile(r"(?<![0-9])[0-9]{1,3},[0-9]{3}(?![0-9])")
WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
ODD_WORD = re.compile(r"[EID]|d[A-Z]|inf|triangle|matrix|^(?:[Pp]i|true|false)$")    # E and I are numbers there
NAME = re.compile(r"\\?[a-z]+(?:_[0-9a-z]|_\{[0-9a-z]+\}|\([a-z]\))?")
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[^ ]")
QUOTIENT = re.compile(r"(-?)(?:\\frac ?\{([0-9]+)\} ?\{([0-9]+)\}|([0-9]+)/([0-9]+))")
POWER_OF_TEN = re.compile(r"(-?[0-9]*\.[0-9]+)\*10\^\{?([0-9]+)\}?")
BRACKET = re.compile(r"[(\[{]")
UNBRACED = re.compile(r"\\(?:text|math|mbox|[{}]|le|ge|ne|cup|in)|[(\[<>]|[0-9],[0-9]|(?<![\\a-zA-Z])[a-zA-Z]{2}")
BRACES = re.compile(r"\\.|[{}]")
OPEN, CLOSE = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}"}, {")", "]", "}", r"\}"}
LISTED, EQUAL, COMPARED, JOINED = {",", ";"}, {"=", r"\approx", r"\in"}, {"<", ">", r"\le", r"\ge", r"\ne"}, {r"\cup"}
SEPARATORS = LISTED | EQUAL | COMPARED | JOINED | {r"\{", r"\pm", "[", "]"}


def canonical(answer: str):
    """The value, hashable and equal for equal answers: Decimal or Fraction for a number, else str, tuple, frozenset."""
    if len(answer) <= LONGEST:
        return _value(answer)
    text = " ".join(answer.split())             # Decimal keeps any number of digits in linear time
    return _decimal(text) if NUMBER.fullmatch(text) else text


def same(truth: str, found: str) -> bool:
    """Whether `found` answers what `truth` asks.

    Equal values do. So does x = 5 where 5 is asked and 5 where x = 5 is, but not y = 5 where x = 5 is; 1, 2 where
    (1, 2) is; 50% where 0.5 or 50 is and the other way round, but not 12.5% where 12.5 is.
    """
    wanted, value = canonical(truth), canonical(found)
    if _kind(wanted) == "(" and _kind(value) == "," and len(value[1]) == len(wanted) - 2:
        value = canonical(f"({found})")
    return _same(wanted, value, "." in truth + found)


def _kind(value) -> str:
    return value[0] if type(value) is tuple else ""


def _same(truth, found, decimal: bool) -> bool:
    if truth == found:
        return truth != ""
    if _kind(found) == "=" != _kind(truth):
        return _same(truth, found[2], decimal)
    if _kind(truth) == "=" != _kind(found) and type(truth[1]) is str and NAME.fullmatch(truth[1]):
        return _same(truth[2], found, decimal)                  # a name: 5 is no answer to 2x = 5
    percent, number = (truth[1], found) if _kind(truth) == "%" else (found[1] if _kind(found) == "%" else None, truth)
    if percent is None or not isinstance(number, (int, Decimal, Fraction)):
        return False
    whole = Fraction(percent).denominator == 1 and not decimal
    return Fraction(percent) / 100 == number or whole and percent == number


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace(" ", ""))


@lru_cache(4096)
def _value(answer: str):
    text = answer.strip()
    if NUMBER.fullmatch(text):
        return _decimal(text)
    for needle, pattern, new in REWRITES:
        if needle in text:
            text = pattern.sub(new, text)
    text = AND.sub(",", " ".join(text.split()))
    try:
        text = _without_unit(text)
        bare = _without_braces(text)
        if NUMBER.fullmatch(bare):
            return _decimal(bare)
        if bare.endswith("%") and "E" not in bare and NUMBER.fullmatch(bare[:-1]):
            return "%", _decimal(bare[:-1])
        if quotient := QUOTIENT.fullmatch(bare):
            sign, over, under = quotient[1], quotient[2] or quotient[4], quotient[3] or quotient[5]
            return Fraction(int(sign + over), int(under))
        if (whole := WHOLE.fullmatch(bare)) or WORDS.fullmatch(bare):
            return _word(whole[1].strip() if whole else bare, bare)
        if SWALLOWED.search(bare) or THOUSANDS.search(bare) and not BRACKET.search(bare):       # 2t, 1,234,5
            raise Unread
        return _read(TOKEN.findall(bare), 0)
    except (Unread, ZeroDivisionError):
        return re.sub(r"(?<![\w,]) | (?!\w)", "", text)         # `1 2` is not 12, `1, 234` not 1,234


def _without_unit(text: str) -> str:
    at = TEXT_START.search(text)
    if at and at.start() and ENDS_IN_BRACE.search(text):
        if not LAST_TEXT.match(text, at.start()):
            raise Unread                    # there everything from the first \text to the last brace is a unit
        text = text[:at.start()].strip()
    return UNIT.sub("", text)


def _without_braces(text: str) -> str:
    """\\boxed{{3}} is 3. There it is the set of 3, so braces around anything but numbers, letters and signs stay."""
    if text.startswith("{") and text.endswith("}") and not UNBRACED.search(text):
        depth = 0
        for token in BRACES.finditer(text):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return _without_braces(text[1:-1].strip()) if token.end() == len(text) else text
    return text


def _word(inner: str, text: str) -> str | Decimal:
    """The value of letters and of \\text{...} that is the whole answer: \\text{(B)} is B, \\text{5} is 5."""
    if inner is not text and re.fullmatch("-?[0-9]+", inner):
        return Decimal(inner)
    if inner == "I":
        return text
    if inner is text and len(inner) > 1 and (ODD_WORD.search(inner) or SWALLOWED.search(inner)):
        return "letters " + inner                               # equals itself and not \text{...}
    inner = re.sub(r"^\(([A-Za-z])\)$", r"\1", inner)
    return inner.replace(" ", "").lower() if WORDS.fullmatch(inner) else text.replace(" ", "").lower()


def _split(tokens: list[str], at: set[str]) -> tuple[list[list[str]], list[str]]:
    """The parts between the separators `at` that stand outside all brackets, and those separators."""
    parts, found, stack = [[]], [], []
    for token in tokens:
        if token in at and not stack:
            found.append(token)
            parts.append([])
            continue
        if token in OPEN:
            stack.append(OPEN[token])
        elif token in CLOSE and (not stack or token not in stack.pop()):
            raise Unread
        parts[-1].append(token)
    if stack:
        raise Unread
    return parts, found


def _read(tokens: list[str], depth: int):
    """The value of a list, an equation, an inequality, a union, a set, a tuple, else a sum of products."""
    if depth > DEEPEST or not tokens:
        raise Unread
    there = SEPARATORS.intersection(tokens)
    if not there:
        return _sum(tokens)
    for separators, meaning in ((LISTED, _list), (EQUAL, _equation), (COMPARED, _inequality), (JOINED, _union)):
        if not separators.isdisjoint(there):
            parts, found = _split(tokens, separators)
            if found:
                return meaning(parts, found, depth + 1)
    if tokens[0] == r"\{" and tokens[-1] == r"\}":
        return _read(tokens[1:-1], depth + 1)
    if tokens[0] in "([" and tokens[-1] in ")]" and "," in there:
        return tokens[0], *(_read(part, depth + 1) for part in _split(tokens[1:-1], {","})[0]), tokens[-1]
    if tokens.count(r"\pm") == 1:
        i = tokens.index(r"\pm")
        return _collect([_read([*tokens[:i], sign, *tokens[i + 1:]], depth + 1) for sign in "+-"])
    return _sum(tokens)


def _list(parts: list[list[str]], found: list[str], depth: int):
    return _collect([_read(part, depth) for part in parts])


def _collect(values: list):
    """x = 1, x = 2 and x = 1, 2 are an equation with a list on the right; a = 1, b = 2 is a list of equations."""
    sides = [value[1] if _kind(value) == "=" else None for value in values]
    if sides[0] is not None and (len(set(sides)) == 1 or not any(side is not None for side in sides[1:])):
        return "=", sides[0], _collect([value[2] if _kind(value) == "=" else value for value in values])
    flat = {part for value in values for part in (value[1] if _kind(value) == "," else [value])}
    return (",", frozenset(flat)) if len(flat) > 1 else values[0]


def _equation(parts: list[list[str]], found: list[str], depth: int):
    value = _read(parts[-1], depth)
    return value if not parts[0] and found == [r"\approx"] else ("=", _side(parts[0], depth), value)


def _side(tokens: list[str], depth: int):
    """The left-hand side of an equation; a name of several letters or with an index is text."""
    text = "".join(tokens)
    if whole := WHOLE.fullmatch(text):
        return whole[1].lower()
    try:
        return text.lower() if text.isalpha() else _read(tokens, depth)
    except (Unread, ZeroDivisionError):
        return text


def _inequality(parts: list[list[str]], found: list[str], depth: int):
    values = [_read(part, depth) for part in parts]
    turned = {(">",): "<", (r"\ge",): r"\le"}.get(tuple(found))
    return (turned, *reversed(values)) if turned else (*found, *values)


def _union(parts: list[list[str]], found: list[str], depth: int):
    return r"\cup", frozenset(_read(part, depth) for part in parts)


def _sum(tokens: list[str]):
    """A whole number is another value than the decimals that make it up, where floating point misses it: 4.6 * 10^2."""
    if len(tokens) == 1 and re.fullmatch("[0-9]+", tokens[0]):
        return int(tokens[0])
    value = value_of(Reader(tokens).whole())
    if isinstance(value, (int, Fraction)) and value.denominator == 1 and any(
            "." in token and Fraction(token) != Fraction(float(token)) for token in tokens):
        power = POWER_OF_TEN.fullmatch("".join(tokens))
        if not power or len(power[2]) > 3 or float(Fraction(float(power[1])) * 10 ** int(power[2])) != value:
            return "decimals", value
    return value
