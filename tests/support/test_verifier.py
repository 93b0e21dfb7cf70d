"""What support/verifier.py promises: the answer is found where it stands, and only right answers are right."""
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
    ("#### \nso 5", "auto", "5"),
    ("#### 1,234 dollars", "auto", "1234"),
    ("#### Step 2\nIt is 7", "auto", "7"),
    ("#### x = 42", "auto", "42"),
    ("paid 5 by customer #3", "auto", "5"),
    ("Customer #3 pays 5", "auto", "5"),
    ("rose by 50%.", "auto", "50%"),
    ("It takes 3 1/2 hours", "auto", "3 1/2"),
    ("It takes 3 1/2.", "auto", "3 1/2"),
    ("The answer is 7/3.", "auto", "7/3"),
    ("The answer is 7/3.5.", "auto", "7/3.5"),
    ("It takes 3\\frac{1}{2} hours", "auto", None),
    ("The answer is 42, not 43.", "auto", "42"),
    ("The answer is 3 + 4 = 7.", "auto", "7"),
    ("Answer: 3. The answer is 7.", "auto", "3"),
    ("answer\n" + "x" * 60 + " 4 and 5", "auto", "5"),
    ("\\boxed{5} The final answer is 7.", "auto", "7"),
    ("The answer is **$42**.", "auto", "42"),
    ("so $x = \\frac12$ holds", "auto", "x = \\frac12"),
    ("so \\(x = 5\\) in 3 steps", "auto", "3"),
    ("Ann has $20, Bob $15; together $35.", "auto", "35"),
    ("$1$ and $2$", "auto", "1, 2"),
    ("so $5\\text{ cm}$", "auto", "5\\text{ cm}"),
    ("\\[ 5\\text{ cm} \\]", "auto", None),
    ("1 234 567 people", "auto", "1234567"),
    ("It is 12,34.", "auto", "12.34"),
    ("in 6 * 7 ways", "auto", "6 * 7"),
    ("It is 1e3.", "auto", None),
    ("It is 2\\pi.", "auto", None),
    ("x5 (42)", "auto", None),
    ("\\boxed{1} and \\boxed{2}", "auto", "1, 2"),
    ("$\\boxed{1}$, so $\\boxed{2}$", "auto", "2"),
    ("\\fbox{3} of 12", "auto", "12"),
    (" Yes ", "auto", "Yes"),
    ("", "auto", None),
]


@pytest.mark.parametrize("text, verifier, found", EXTRACT)
def test_extract_finds_the_answer(text, verifier, found):
    """fails if: _last takes the first match, BRACE loses its escapes, or an unclosed box runs to the end"""
    assert ev.extract(text, verifier) == found


EQUAL = [       # every member of a group equals every other, and no member of another group
    ["1234", "1,234", "01234", "+1234", "1234.0", "1.234E3", "1234E0", " 1234 ", "$1,234$", "\\$1234", "\\text{1234}",
     "1{,}234", "1,\\!234", "\\(1234\\)", "2468/2", "1.2340E+03", "1.234\\times10^3", "1.234 \\cdot 10^{3}", "{1234}",
     "\\textbf{1234}", "{{1234}}", "1234\\text{ cm}", "1234 cm", "1234\\,\\mathrm{kg}",
     "1234\\text{ m}^2", "1234^\\circ",
     "1234 square meters", "1200+34", "\\sqrt{1522756}"],
    ["-3", "\u22123", "- 3", "-3.0", "$-3$", "-6/2", "\\frac{-6}{2}", "-\\frac{6}{2}", "\\frac{6}{-2}", "\\text{-3}"],
    ["0.5", ".5", "0.50", "1/2", "\\frac{1}{2}", "\\frac12", "\\frac 1 2", "\\frac1{2}", "\\frac{1}2", "2^{-1}",
     "\\dfrac{1}{2}", "\\tfrac{2}{4}", "\\dfrac12", "5E-1", "0.5/1", "1 / 2"],
    ["50%", "50\\%", "50 %", "50.0\\%", "50\\text{percent}"],
    ["1.5", "3/2", "1\\frac12", "1 \\frac{1}{2}", "+1\\dfrac{1}{2}", "1+\\frac12"],
    ["1 1/2"], ["-1.5", "-1\\frac12", "-3/2"], ["11/2", "5.5"],
    ["0", "-0", "0.000", "0/7", "0E9"], ["0.01", "10^{-2}"],
    ["0.3333333333333333"], ["1/3", "\\frac13", "2/6"],
    ["9007199254740993"], ["9007199254740992"],
    ["1E400", "10E399"], ["1E401"], ["1E999999999"], ["1E-999999999"], ["1e3"],
    ["1 2", "1\\quad 2", "1 \\; 2"], ["12"], ["1~2"], ["12."], ["12\\degree"],
    ["1, 234", "1,  234", "234,1", "\\{1, 234\\}", "1 \\text{ and } 234", "1 and 234", "1, 1, 234", "\\{234, 1\\}"],
    ["(1,234)", "(1, 234)", "\\left( 1, 234 \\right)"], ["(234,1)"], ["[1,234]"], ["[1,234)"],
    ["(0.5,2)", "(\\frac12, 2)", "\\left(\\frac{1}{2},\\;2\\right)", "( 1/2 , 2 )"],
    ["(-\\infty,0]\\cup(1,2)", "(1, 2) \\cup (-\\infty, 0]"],
    ["12,34", "34, 12"], ["1,23"], ["0,123"], ["123"], ["1,234,5"],
    ["1/0"], ["\\frac{1}{0}"], ["1e3%"], ["%"], ["1e" + "9" * 30], ["--5"], ["1_000"], ["nan"], ["\\infty"],
    ["5", "\\{5\\}"], ["\u0665"], ["5 dollars"], ["5x", "x \\cdot 5", "5 x", "10x/2"], ["5t"],
    ["2\\frac{-1}{2}"], ["2(3)"], ["2(x+1)", "2x+2"],
    ["2\\frac{3}{2}", "7/2"],
    ["\\frac{\\sqrt{3}}{2}", "\\dfrac{\\sqrt{3}}{2}", "$\\tfrac{\\sqrt{3}}{2}$", "\\sqrt3/2", "\\frac12\\sqrt3",
     "\\frac{3}{2\\sqrt3}", "\\frac{\\sqrt{12}}{4}", "\\sqrt{\\frac34}", "(3^{1/2})/2"],
    ["\\sqrt2", "\\sqrt{2}", "\\sqrt 2", "\\frac{2}{\\sqrt2}", "\\frac{1}{\\sqrt2-1}-1"], ["\\sqrt[3]{2}"],
    ["\\sqrt{3}"],
    ["\\frac{\\pi}{2}", "\\pi/2", "0.5\\pi", "\\frac12 \\pi", "π/2", "\\frac{\\pi}{2}\\text{ cm}"], ["1/2\\pi"],
    ["\\frac\\pi2"],
    ["x+1", " x + 1 ", "1+x", "\\left(x+1\\right)", "x + 2 - 1", "X+1"], ["x+2"],
    ["x^2-1", "(x+1)(x-1)", "x^{2} - 1", "-1+x\\cdot x"], ["\\frac{x^2-1}{x}", "x-1/x", "x-x^{-1}"],
    ["2^n", "2^{n}"], ["\\ln 2", "\\ln(2)", "\\ln{2}"], ["f(x)"], ["n!"],
    ["x=5", "x = 5", "x = \\frac{10}{2}", "x \\approx 5", "x=5\\text{ cm}"], ["y = 5"], ["5 = x"],
    ["x = 1, 2", "x=2,x=1", "x = 1 \\text{ or } x = 2", "x \\in \\{1, 2\\}"], ["a = 1, b = 2", "b=2, a=1"],
    ["a = 2, b = 1"],
    ["\\pm 3", "3, -3", "\\{-3,3\\}"], ["1\\pm\\sqrt2", "1+\\sqrt{2}, 1-\\sqrt{2}"],
    ["x<3", "3 > x"], ["x>3", "3<x"], ["x \\le 3", "x\\leq3", "3 \\ge x", "x≤3", "x <= 3"], ["1<x<2"],
    ["\\leftarrow"], ["arrow"], ["B", "(B)", "b", "\\text{(B)}", "\\textbf{(B)}", "\\mathrm{B}"],
    ["\\textbf{(B)} 5"], ["I"],
    ["Monday", "\\text{Monday}", "\\textbf{ monday }", "MonDay".lower()], ["no solution", "\\text{No solution}"],
    ["no more"],
    ["\\text{no more}"], ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"],
    ["9" * 5000, "0" + "9" * 5000 + ".0"], ["9" * 5001], ["__import__('os').getcwd()"],
]


def test_equal_answers_are_equal_and_all_others_differ():
    """fails if: numbers become floats, REWRITES loses a row, or mixed() lets 2\\frac{-1}{2} be read as 3/2"""
    values = [(group, text, ev.canonical(text)) for group, texts in enumerate(EQUAL) for text in texts]
    for (group, text, value), (other, text2, value2) in itertools.combinations(values, 2):
        assert (value == value2) == (group == other), (text, text2)
        assert (hash(value) == hash(value2)) or group != other, (text, text2)


GRADE = [       # text, answer, verifier -> verdict
    ("so \\boxed{1,234}", "1234", "auto", True),
    ("so \\boxed{5 cm}", "5", "auto", True),
    ("so \\boxed{5\\text{ cm}}", "5\\text{ m}", "auto", True),
    ("so \\boxed{x=5}", "5", "auto", True),
    ("so \\boxed{5}", "x=5", "auto", True),
    ("so \\boxed{5}", "2x=5", "auto", False),
    ("so \\boxed{x=5}", "y=5", "auto", False),
    ("\\boxed{50\\%}", "0.5", "auto", True),
    ("\\boxed{50\\%}", "50", "auto", True),
    ("\\boxed{0.5}", "50%", "auto", True),
    ("\\boxed{12.5\\%}", "12.5", "auto", False),
    ("\\boxed{12.5\\%}", "\\frac18", "auto", True),
    ("\\boxed{50\\%}", "50.0", "auto", False),
    ("\\boxed{1, 2}", "(1, 2)", "auto", True),
    ("\\boxed{2, 1}", "(1, 2)", "auto", False),
    ("\\boxed{(1, 2)}", "1, 2", "auto", False),
    ("It takes 3 1/2 hours", "1/2", "auto", False),
    ("It takes 3 1/2 hours", "3 1/2", "auto", True),
    ("\\boxed{3\\frac12}", "7/2", "auto", True),
    ("\\boxed{\\textbf{42}}", "42", "auto", True),
    ("\\boxed{{3}}", "3", "auto", True),
    ("we get $\\frac{1}{2}$.", "0.5", "auto", True),
    ("Paid 5 by customer #3", "3", "auto", False),
    ("\\boxed{4.6\\times10^2}", "460", "auto", False),       # 459.99999999999994 in floating point, so wrong there
    ("\\boxed{4.6\\times10^2}", "4.6 \\cdot 10^{2}", "auto", True),
    ("\\boxed{1.2\\times10^3}", "1200", "auto", True),
    ("\\boxed{2t+3}", "3+2t", "auto", False),               # there the last t is a unit, tons
    ("\\boxed{2x+3}", "3+2x", "auto", True),
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
    ("#### 18 dollars", "18", "auto", True),
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
    """fails if: LONGEST is lifted, a {1,400} of SPAN becomes +, or _after looks at all candidates"""
    n, start = 20_000, time.process_time()
    texts = ["9" * n, "1,111" * n, "1/" * n, "1e" * n, "-" * n, "1 " * n, "#" * n, "#1" * n, "\\" * n,
             "^ " * n, "\\boxed{" * n, "\\boxed{" + "{" * n, "\\boxed" + " " * n, "1" + " " * n + "1",
             "\\frac11" * n, "answer 1" * n, "answer$$" * n, "answer$1$ " * n, "\\[" * n, "\\( " * n, "$1" * n,
             "$ $" * n,
             "final answer is " * n, "answer = " * n, "\\boxed{1}" * n, "x$\\boxed{1}$" * n, "####1 " * n, "1+" * n]
    boxed = ["9" * n, "9" * n + "%", "0" * n + "5", "1e" + "9" * n, "." * n, "1" * n + "/" + "7" * n,
             "{" * n + "}" * n, "1" * n + " 1/2", "\\frac{" * n + "}" * n, "\\text{" * n + "}" * n,
             "1e999999999999999999", "1e-999999999999999999"]
    short = ["(x+y+z)^{99}", "((x+1)^{40})^{40}", "9^{99}" * 40, "{{{" * 90, "(" * 290, "\\sqrt{" * 40 + "2" + "}" * 40,
             "x^" * 140, "\\frac{1}{" * 25 + "x+y" + "}" * 25, "\\sqrt{999999999989}", "a+b" * 90, "1,2;" * 70,
             "\\pm" * 90,
             "9" * 299 + "\\frac{1}{3}", "x=" * 140, "1E999999999%", "1E999999999+1", "1E99999999999",
             "((x+y)^{7}(y+z)^{7})^{7}"]
    for text in texts + [f"\\boxed{{{inner}}}" for inner in boxed + short]:
        ev.grade(text, "1/3")
        ev.grade(text, text)
    assert time.process_time() - start < 8           # about 2 s; one quadratic case takes much longer


def test_auto_is_right_only_where_math_verify_is():
    """fails if: 3 1/2 is read as 7/2 or as 1/2 (a `raise Unread` of Reader.factors dropped)"""
    pytest.importorskip("math_verify", reason="pip install math-verify")
    attack = Path(__file__).resolve().parents[1] / "attack" / "verifier.py"
    ended = subprocess.run([sys.executable, attack, "--count", "300"], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0 and " 0 right here alone" in ended.stdout, ended.stdout + ended.stderr


def test_auto_is_right_only_where_math_verify_was():
    """On the gradings that tests/attack/verifier.py --write has stored, for machines without math-verify.
    fails if: 12.5% equals 12.5 (`whole and` dropped in answers._same), or the row of \\dfrac leaves REWRITES"""
    path = Path(__file__).resolve().parents[1] / "data" / "gradings.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(row, ev.grade(row["response"], row["truth"])) for row in rows]
    alone = [row for row, right in found if right and row["theirs"] == "wrong"]
    shared = [right for row, right in found if row["theirs"] == "right"]
    changed = [row for row, right in found if right != row["ours"]]
    assert len(rows) >= 300 and alone == [], alone
    assert shared.count(False) <= 0.03 * len(shared), changed


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
