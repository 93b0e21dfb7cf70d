"""The verifier: where the answer stands in a response, and whether it is the right one.

Grading = extraction (find the answer in the text), then equality of two canonical values: linear in the length
of the text, nothing executed, no algebra.
"""
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from support.errors import UserError

VERIFIERS = ("auto", "boxed", "hash", "number", "exact", "math-verify")
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([-+]?[0-9][0-9.,/]*))")        # MATH also writes \boxed 2
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)                                  # \{ is one token, not a brace
HASH = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
ANY_HASH = re.compile(r"(?<!#)(?:####|#(?=\S))(?!#)([^\n#]*)")              # `# ` with a space is a heading
NUMBER = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
LAST_NUMBER = re.compile(rf"((?:(?<![\w)\]}}])[-+])?{NUMBER}(?: ?/ ?{NUMBER})?)(?: ?\\?%)?")  # 5-3 ends in 3


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _boxed(text: str) -> str | None:
    """Content of the last \\boxed{} or \\fbox{}, braces balanced; None where its brace never closes."""
    box, depth = _last(BOX, text), 1
    if box is None or box[1]:
        return box and box[1]
    for token in BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[box.end():token.start()].strip() or None
    return None


def marked(text: str) -> str | None:
    """The answer that a worked solution marks by \\boxed{} or ####, None if it marks none."""
    return extract(text, "boxed") or extract(text, "hash")


def extract(text: str, verifier: str = "auto") -> str | None:
    """The answer as it stands in a response, None if there is none. Where a verifier looks: see grade()."""
    auto = verifier in ("auto", "math-verify")
    if verifier == "boxed" or auto and BOX.search(text):
        return _boxed(text)
    if verifier == "hash" or auto and ANY_HASH.search(text):
        match = _last(ANY_HASH if auto else HASH, text)
        return match and match[1].strip() or None
    match = _last(LAST_NUMBER, text.replace("\N{MINUS SIGN}", "-")) if verifier != "exact" else None
    if verifier == "number":
        return match and match[1]       # without its percent sign
    return match[0] if match else text.strip() or None


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\[!,()\[\]]|\\?\$|\\(?:left|right)(?![a-zA-Z])|\^ ?(?:\\circ|\{ ?\\circ ?\})|°", ""),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1"),
    (r"\\[;: ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\{,\}", ","),                                        # 1{,}234 is LaTeX for 1,234
    (r"\\%", "%"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac ?(?:([0-9])|\{([^{}]*)\}) ?(?:([0-9])|\{([^{}]*)\})", r"\\frac{\1\2}{\3\4}"),
    (r" +", " "),
    (r"(?<![0-9,]) | (?![0-9])", ""))]      # `1 2` is not 12 and `1, 234` is not 1,234: these two spaces stay
PLAIN = re.compile(rf"[-+]?{NUMBER}")
PART = r"[-+]?[0-9]{1,300}(?:\.[0-9]{1,300})?"          # bounded: int() and gcd are quadratic in the digits
FRAC = re.compile(rf"\\frac\{{({PART})\}}\{{({PART})\}}")
RATIO = re.compile(rf"([-+]?) ?(?:([0-9]{{1,300}}) )?({PART})/({PART})")


def canonical(answer: str) -> Decimal | Fraction | str:
    """A hashable value, equal for equal answers: an exact number where the text is one, else the tidied text.

    Python compares and hashes Decimal and Fraction exactly and alike (0.5 == 1/2): no float, no tolerance.
    Decimal keeps 1e999999 as digits and exponent, Fraction would write out a million digits.
    """
    text = " ".join(answer.replace("\N{MINUS SIGN}", "-").split())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".")
    value = _number(text.removesuffix("%"), percent=text.endswith("%"))
    return text.replace(", ", ",") if value is None else value


def _number(text: str, percent: bool) -> Decimal | Fraction | None:
    try:
        if PLAIN.fullmatch(text):       # the constructor is exact; Decimal arithmetic rounds to 28 digits
            return Decimal(text.replace(",", "") + "e-2" * percent)
        ratio = RATIO.fullmatch(FRAC.sub(r" \1/\2", text).strip())
        if ratio is None:
            return None
        sign, whole, over, under = ratio.groups()
        value = Fraction(over) / Fraction(under)
    except (InvalidOperation, ZeroDivisionError):       # an exponent beyond 10**18, 1e3%, 1/0: stays text
        return None
    if whole and not ((over + under).isdigit() and value < 1):      # 2\frac{3}{2} may as well be a product
        return None
    value += int(whole or 0)
    return (-value if sign == "-" else value) / (100 if percent else 1)


def grade(text: str, answer: str | tuple[str, ...], verifier: str = "auto") -> bool:
    """True if the response `text` gives `answer` (of several, any). A response without one is wrong, never an error.

    Where a verifier looks:
      boxed        the last \\boxed{} or \\fbox{}, braces balanced; one that never closes is no answer
      hash         after the last ####, to the end of the line (GSM8K)
      number       the last number in the text, a/b being one number; on both sides units and % do not count
      exact        the whole text: the answer to the character, white space at the ends aside
      auto         boxed if there is a box, else after the last #### or # (`1*2=2#2`), else the last number,
                   else the whole text
      math-verify  that package decides (pip install math-verify)

    Equal (exact and math-verify aside) are the same numbers, 1,234 = 1234.0 = +01234 = 1.234e3 and
    0.5 = 1/2 = \\tfrac{2}{4} and 1\\frac12 = 1 1/2 = 1.5, without tolerance; and the same texts but for
    white space, $, \\left, \\right, \\text{}, thin spaces, a trailing dot and the degree sign. 50% equals 50%
    and 0.5, not 50. Units and letter case count: 5 cm is not 5.

    Weaker than math-verify: no algebra (x+1 is not 1+x), sets, intervals, roots or equations (x=5 is not 5).
    It errs towards wrong: compare only runs that were graded by one verifier.
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
    if verifier == "number":
        truth = extract(truth, "number") or truth
    return canonical(found) == canonical(truth) != ""
