"""What support/verifier.py promises: the answer is found where it stands, and only right answers are right."""
import itertools
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import verifier as ev  # noqa: E402
from support.errors import UserError  # noqa: E402

EXTRACT = [     # text, verifier -> the answer in it
    ("a \\boxed{1} b \\boxed{2}", "boxed", "2"),
    ("\\boxed{\\frac{1}{2}}", "boxed", "\\frac{1}{2}"),
    ("\\boxed{ {a} {b{c}} } x}", "boxed", "{a} {b{c}}"),
    ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
    ("\\boxed{\\}", "boxed", None),
    ("\\boxed{x = \\fbox{3}}", "boxed", "3"),
    ("\\fbox{3}", "boxed", "3"),
    ("\\boxed {4}", "boxed", "4"),
    ("\\boxed 4$ or so", "boxed", "4"),
    ("\\boxed{1} then \\boxed{2", "boxed", None),
    ("\\boxed{}", "boxed", None),
    ("\\boxed{ }", "boxed", None),
    ("answer in \\boxed please: 4", "boxed", None),
    ("boxed{4}", "boxed", None),
    ("#### 5", "boxed", None),
    ("so\n#### 18\n", "hash", "18"),
    ("#### 1\n#### 2\nDone.", "hash", "2"),
    ("####", "hash", None),
    ("2#2", "hash", None),
    ("##### 5", "hash", None),
    ("\\boxed{4}", "hash", None),
    ("1 2 3", "number", "3"),
    ("costs 1,234,567.50 in all", "number", "1,234,567.50"),
    ("1,2,3", "number", "3"),
    ("(1,23)", "number", "23"),
    ("so 42.", "number", "42"),
    ("it is .5", "number", ".5"),
    ("10-5", "number", "5"),
    ("x=-5", "number", "-5"),
    ("f(x)-5", "number", "5"),
    ("x = \u22125", "number", "-5"),
    ("of 3/4 cup", "number", "3/4"),
    ("about 6.02e23 atoms", "number", "6.02e23"),
    ("rose by 50%.", "number", "50"),
    ("none", "number", None),
    ("  a b\n", "exact", "a b"),
    (" \n", "exact", None),
    ("3+8=1;1*2=2#2", "auto", "2"),
    ("#2", "auto", "2"),
    ("1#2#3", "auto", "3"),
    ("2#", "auto", "2"),
    ("# Answer\nIt is 7", "auto", "7"),
    ("## Step 1\n\\boxed{8}\n#### 9", "auto", "8"),
    ("\\boxed{8", "auto", None),
    ("a \\boxed is missing, 8", "auto", "8"),
    ("#### \nso 5", "auto", None),
    ("rose by 50\\%.", "auto", "50\\%"),
    (" Yes ", "auto", "Yes"),
    ("", "auto", None),
]


@pytest.mark.parametrize("text, verifier, found", EXTRACT)
def test_extract_finds_the_answer(text, verifier, found):
    """fails if: _last takes the first match, BRACE loses its escapes, or an unclosed box runs to the end"""
    assert ev.extract(text, verifier) == found


EQUAL = [       # every member of a group equals every other, and no member of another group
    ["1234", "1,234", "01234", "+1234", "1234.0", "1.234e3", "1234E0", " 1234 ", "$1,234$", "\\$1234",
     "1{,}234", "1,\\!234", "\\(1234\\)", "1234.", "$1234.$", "\\text{1234}", "2468/2", "1.2340e+03"],
    ["-3", "\u22123", "- 3", "-3.0", "$-3$", "-6/2", "\\frac{-6}{2}", "-\\frac{6}{2}", "\\frac{6}{-2}"],
    ["0.5", ".5", "0.50", "1/2", "\\frac{1}{2}", "\\frac12", "\\frac 1 2", "\\frac1{2}", "\\frac{1}2",
     "\\dfrac{1}{2}", "\\tfrac{2}{4}", "\\dfrac12", "50%", "50\\%", "50 %", "5e-1", "0.5/1", "1 / 2"],
    ["50", "50.", "5e1", "50^\\circ", "50^{\\circ}", "50°"],
    ["1.5", "3/2", "1\\frac12", "1 \\frac{1}{2}", "1 1/2", "+1\\dfrac{1}{2}"],
    ["-1.5", "-1\\frac12", "-1 1/2", "-3/2"],
    ["11/2", "5.5"],
    ["0", "-0", "0.000", "0/7", "0%", "0e9"],
    ["1e-2", "1%", "0.01"],
    ["5 cm", "5\\text{ cm}", "5cm", "$5$ cm", "5\\,\\text{cm}", "5~\\mathrm{cm}"],
    ["0.3333333333333333"], ["1/3", "\\frac13", "2/6"],
    ["9007199254740993"], ["9007199254740992"],
    ["1e400", "10e399"], ["1e401"], ["1e999999999"], ["1e-999999999"],
    ["1 2", "1\\quad 2", "1 ~ 2"], ["12"], ["1, 234", "1,  234"],
    ["(1,234)", "(1, 234)", "\\left( 1, 234 \\right)"],
    ["(1,2)", "(1, 2)", "\\left(1,\\;2\\right)", "( 1 , 2 )"],
    ["12,34"], ["1,23"], ["0,123"], ["123"], ["1234,567"],
    ["1/0"], ["\\frac{1}{0}"], ["1e3%"], ["%"], ["1e" + "9" * 30], ["--5"], ["1_000"], ["nan"], ["inf"],
    ["5"], ["\u0665"],
    ["2\\frac{3}{2}"], ["2\\frac{-1}{2}"],
    ["\\frac{\\sqrt{3}}{2}", "\\dfrac{\\sqrt{3}}{2}", "$\\tfrac{\\sqrt{3}}{2}$"],
    ["x+1", " x + 1 ", "\\left x+1\\right."], ["1+x"],
    ["\\leftarrow"], ["arrow"], ["(B)", "\\text{(B)}", "\\textbf{(B)}"], ["(b)"], ["B"],
    ["9" * 5000, "0" + "9" * 5000 + ".0"], ["9" * 5001], ["__import__('os').getcwd()"],
]


def test_equal_answers_are_equal_and_all_others_differ():
    """fails if: canonical compares floats, REWRITES loses a row, or RATIO lets `11/2` be read as 1 1/2"""
    values = [(group, text, ev.canonical(text)) for group, texts in enumerate(EQUAL) for text in texts]
    for (group, text, value), (other, text2, value2) in itertools.combinations(values, 2):
        assert (value == value2) == (group == other), (text, text2)
        assert (hash(value) == hash(value2)) or group != other, (text, text2)


GRADE = [       # text, answer, verifier -> verdict
    ("so \\boxed{1,234}", "1234", "auto", True),
    ("so \\boxed{5 cm}", "5", "auto", False),
    ("so \\boxed{x=5}", "5", "auto", False),
    ("\\boxed{50\\%}", "0.5", "auto", True),
    ("\\boxed{50\\%}", "50", "auto", False),
    ("it is 50%", "50", "number", True),
    ("it is 50", "50%", "number", True),
    ("\\boxed{4} or 5", "5", "number", True),
    ("\\boxed{4} or 5", "4", "auto", True),
    ("16", "#### 16", "auto", True),
    ("16", "so \\boxed{16.0}", "number", True),
    ("It costs $1,200.50.", "$1,200.50", "number", True),
    ("I think 7", "seven", "number", False),
    ("3+8=1;1*2=2#2", "2", "auto", True),
    ("3+8=1;1*2=2#3", "2", "auto", False),
    ("3+8=1;1*2=2#2", "2", "hash", False),
    ("#### 18 dollars", "18", "hash", False),
    ("#### 18", "18", "boxed", False),
    ("Paris", "Paris", "auto", True),
    ("Paris", "paris", "auto", False),
    (" a\tb ", "a\tb", "exact", True),
    ("2.0", "2", "exact", False),
    ("\\boxed{2}", "2", "exact", False),
    ("", "", "auto", False),
    ("", "", "exact", False),
    ("\\boxed{$}", "$", "auto", False),
    ("#$", "", "auto", False),
]


@pytest.mark.parametrize("text, answer, verifier, verdict", GRADE)
def test_grade(text, answer, verifier, verdict):
    """fails if: an empty answer equals an empty answer (`!= ""` dropped), or `number` keeps the % sign"""
    assert ev.grade(text, answer, verifier) is verdict


def test_grading_time_is_linear_in_the_text():
    """fails if: PART is unbounded ([0-9]+), or `[^{}]*` becomes `.*?` in the \\frac row"""
    n, start = 50_000, time.perf_counter()
    texts = ["9" * n, "1,111" * n, "1/" * n, "1e" * n, "-" * n, "1 " * n, "#" * n, "#1" * n, "\\" * n,
             "^ " * n, "\\boxed{" * n, "\\boxed{" + "{" * n, "\\boxed" + " " * n, "1" + " " * n + "1",
             "\\frac11" * n]
    boxed = ["9" * n, "9" * n + "%", "0" * n + "5", "1e" + "9" * n, "." * n, "1" * n + "/" + "7" * n,
             "{" * n + "}" * n, "1" * n + " 1/2", "\\frac{" * n + "}" * n, "\\text{" * n + "}" * n,
             "1e999999999999999999", "1e-999999999999999999"]
    for text in texts + [f"\\boxed{{{inner}}}" for inner in boxed]:
        ev.grade(text, "1/3")
        ev.grade(text, text)
    assert time.perf_counter() - start < 8          # about 2 s; one quadratic case takes minutes


def test_unknown_verifier_is_refused():
    """fails if: the check of VERIFIERS in grade is removed"""
    with pytest.raises(UserError, match="unknown verifier 'mathverify': choose from auto, boxed"):
        ev.grade("1", "1", "mathverify")


def test_math_verify_is_asked_only_on_request(monkeypatch):
    """fails if: its ImportError passes through, or verify gets the response as the gold answer"""
    monkeypatch.setitem(sys.modules, "math_verify", None)       # None makes the import fail
    assert ev.grade("\\boxed{1}", "1")
    with pytest.raises(UserError, match="pip install math-verify"):
        ev.grade("\\boxed{1}", "1", "math-verify")
    fake = ModuleType("math_verify")
    asked = []
    fake.parse = lambda text: ["parsed", text]
    fake.verify = lambda gold, found: asked.append((gold, found)) or 1
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    assert ev.grade("a response", "so #### 3", "math-verify") is True
    assert asked == [(["parsed", "\\boxed{3}"], ["parsed", "a response"])]
