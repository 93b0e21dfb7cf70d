r"""The verifier against math-verify 0.9, on answers that are made here.

    pip install "math-verify[antlr4_13_2]==0.9.*"
    python tests/attack/verifier.py --count 6000            about a minute
    python tests/attack/verifier.py --seed 1 --misses       another list, and what is missed in it

A grading is a truth, a way to write it or a near miss (other sign, other unit of ten, a part of it, swapped), and a
style of response (box, $...$, prose, bold, ####). Everything is drawn from --seed.

    ours only     called right here and wrong there: must be 0
    theirs only   missed here; at most 3 % of what is called right there
    unread        math-verify finds no answer in the response; how many of these are called right here stands behind it
"""
import argparse
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.verifier import extract, grade  # noqa: E402

MATH = {        # styles for LaTeX
    "box": r"So the answer is $\boxed{%s}$.", "box alone": r"\boxed{%s}", "box in braces": r"Hence \boxed{{%s}}.",
    "box in display": "We add 3 and 4.\n\\[\\boxed{%s}\\]", "box and more": "\\boxed{%s} since $3 + 4 = 7$ and 2 < 3.",
    "two boxes": r"First $\boxed{17}$ for a part of it, and after a good deal of further work, $\boxed{%s}$.",
    "dollars": "Adding 3 and 4, then, we get $%s$.", "answer dollars": "The answer is $%s$.",
    "answer dollars more": "The answer is $%s$, since 3 of the 12 are gone.", "display": "We get\n\\[ %s \\]",
    "double dollars": "It follows that $$%s$$", "parentheses": r"With 12 of them we find \(%s\).",
    "final dollars": "Final Answer: The final answer is $%s$. I hope it is correct."}
PROSE = {       # styles for numbers and words as people write them
    "answer": "The answer is %s.", "Answer:": "12 - 3 = 9\nAnswer: %s", "bold": "**%s**", "answer bold": "The answer is **%s**.",
    "hash": "She buys 3 bags of 4 = 12 pears.\n#### %s", "last": "Of 12 bags 3 are gone, so in total it is %s.",
    "alone": "%s", "line": "3 * 4 = 12\n12 + 5 = 17\nSo we are left with\n%s", "equals": "12 - 3 - 4 = %s",
    "answer more": "The answer is %s, because 3 of them were lost.", "final": "**Final answer:** %s",
    "exclaimed": "Together they have %s!", "x equals": "Hence x = %s."}
# A second list: other texts, units, words and letters (--held_out).
HELD_OUT_MATH = {
    "solution": "Let $x$ be the number of pears. Then $2x + 3 = 17$, so $x = 7$.\n\nThus the final answer is $\\boxed{%s}$.",
    "thinking": "<think>\nMaybe \\boxed{31}? No: 4 * 8 = 32.\n</think>\n\n**Answer:** \\(\\boxed{%s}\\)",
    "aligned": "$$\\begin{aligned} a &= 2 + 3 \\\\ b &= 5 \\end{aligned}$$ Therefore, $$\\boxed{%s}.$$",
    "short": "$\\boxed{%s}$", "wide box": "\\[\n\\boxed{ %s }\n\\]", "bold box": "**Final Answer**\n\n$\\boxed{%s}$",
    "numbered": "1. Add $3$ and $4$.\n2. Double it.\n3. The result is $%s$.", "colon": "Answer: $%s$", "tight display": "\\[%s\\]",
    "claim": "Since $17 > 12$, the value we look for is \\(%s\\), as claimed.",
    "then more": "The correct answer is $%s$. Note that $2 + 2 = 4$ in any case."}
HELD_OUT_PROSE = {
    "so": "First there were 24, then 7 went away. So there are %s", "answer colon bold": "**Answer:** %s", "comma": "In the end, %s, as 9 > 8.",
    "hash last": "5 + 6 = <<5+6=11>>11 eggs.\nTwice that is 22.\n#### %s", "heading": "### Answer\n%s", "equation": "8 x 4 = %s",
    "answer would be": "The answer would be %s if 5 were left.", "final answer is": "The final answer is %s.", "list": "- 4 cats\n- 6 dogs\n\nTotal: %s",
    "must": "Then Tom must have paid %s in total.", "therefore": "Therefore, the total is **%s**.", "sum": "24 - 7 = 17\n17 + 3 = %s"}
HELD_OUT = dict(UNITS=["mm", "yards", "liters", "seconds", "days", "cents", "gallons", "students", "miles", "ounces", "people", "m/s", "weeks"],
                WORDS=["Friday", "red", "odd", "Carlos", "rectangle", "undefined", "None", "convergent", "not possible", "Jane", "isosceles"],
                VARIABLES=["y", "t", "k", r"\alpha", "B", "g(x)", "a_n", r"\text{Total}", "CD", r"x_{1}"])

UNITS = ["cm", "m", "km", "kg", "degrees", "mph", "feet", "hours", "minutes", "dollars", "square units", "inches", "apples", "books"]
WORDS = ["Monday", "Yes", "no", "blue", "Alice", "right triangle", "No solution", "even", "True", "infinitely many"]
VARIABLES = ["x", "y", "n", r"\theta", "A", "f(x)", "x_1", r"\text{Area}", "AB"]


def grouped(n: int, comma: str) -> str:
    return f"{n:,}".replace(",", comma)


def fraction(rng, a: int, b: int) -> str:
    sign, a = "-" * (a < 0), abs(a)
    ways = [rf"{sign}\frac{{{a}}}{{{b}}}", rf"{sign}\dfrac{{{a}}}{{{b}}}", rf"{sign}\tfrac{{{a}}}{{{b}}}", f"{sign}{a}/{b}",
            rf"\frac{{{sign}{a}}}{{{b}}}", rf"{sign}\frac {{{a}}} {{{b}}}"]
    return rng.choice(ways + [rf"{sign}\frac{a}{b}"] * (a < 10 and b < 10))


def integer(rng):
    n = rng.choice([rng.randint(2, 99), rng.randint(100, 99999)])
    plain = [str(n), f"{n}.0", f"{n}.00"]
    return str(n), plain + [f"+{n}", f"0{n}", rf"\text{{{n}}}", rf"\textbf{{{n}}}", rf"\mathbf{{{n}}}"], plain, [
        str(-n), str(n * 10), str(n + 1), f"{n}.5", str(n // 10 or 5), f"{n}x"]


def negative(rng):
    n = rng.randint(1, 999)
    return f"-{n}", [f"-{n}", f"- {n}", f"-{n}.0", f"\N{MINUS SIGN}{n}"], [f"-{n}", f"-{n}.0"], [str(n), str(-n * 10), f"-{n}.5"]


def decimal(rng):
    n, d = rng.randint(0, 99), rng.randint(1, 99)
    text = f"{n}.{d:02}"
    return text, [text, text + "0", "0" + text, f"{n * 100 + d}/100"], [text, text + "0"], [
        f"-{text}", f"{n}.{d:02}7", f"{n}{d:02}", str(n), f"0.{n}{d:02}"]


def thousands(rng):
    n = rng.choice([rng.randint(1000, 9999), rng.randint(10**4, 10**6), rng.randint(10**6, 10**9)])
    ways = [grouped(n, c) for c in (",", "{,}", r"\,", r"\!,", r",\!", " ", r"\ ", "~", ", ")]
    return rng.choice([str(n), grouped(n, ",")]), ways + [str(n), grouped(n, ",") + ".0"], [str(n), grouped(n, ","), grouped(n, " ")], [
        grouped(n, ",")[:-4], str(n)[-3:], grouped(n * 10, ","), "(" + grouped(n, ",") + ")" * 1]


def fractions(rng):
    b = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 64])
    a = rng.choice([-1, 1]) * rng.choice([k for k in range(1, 30) if k % b])
    right = [fraction(rng, a, b) for _ in range(4)] + [fraction(rng, 2 * a, 2 * b)]
    if b in (2, 4, 5, 8, 10, 25):
        right.append(f"{a / b}")
    elif rng.random() < 0.1:
        right.append(f"{a / b:.6f}")
    return fraction(rng, a, b), right, [f"{a}/{b}"] + ([f"{a / b}"] if b in (2, 4, 5) else []), [
        fraction(rng, b, abs(a)) if abs(a) > 1 else str(b), fraction(rng, -a, b), str(a), f"3 {abs(a)}/{b}", f"{a / b:.2f}"]


def mixed(rng):
    w, b = rng.randint(1, 12), rng.choice([2, 3, 4, 5, 8])
    a = rng.randint(1, b - 1)
    truth = rng.choice([rf"{w}\frac{{{a}}}{{{b}}}", rf"\frac{{{w * b + a}}}{{{b}}}", f"{w * b + a}/{b}", f"{w} {a}/{b}"])
    ways = [rf"{w}\frac{a}{b}", rf"{w}\frac{{{a}}}{{{b}}}", rf"{w} \frac{{{a}}}{{{b}}}", rf"{w}\,\dfrac{{{a}}}{{{b}}}", f"{w} {a}/{b}",
            rf"\frac{{{w * b + a}}}{{{b}}}", rf"{w}+\frac{{{a}}}{{{b}}}"]
    return truth, ways, [f"{w} {a}/{b}", f"{w * b + a}/{b}", rf"{w}\frac{{{a}}}{{{b}}}"], [
        f"{a}/{b}", str(w), f"{w * a}/{b}", f"{w + 1} {a}/{b}", rf"-{w}\frac{{{a}}}{{{b}}}"]


def percent(rng):
    n = rng.choice([rng.randint(1, 250), rng.randint(1, 99) + 0.5])
    truth = rng.choice([f"{n}", rf"{n}\%", f"{n}%", f"{n / 100}"])
    return truth, [rf"{n}\%", f"{n}%", rf"{n}\text{{ percent}}", rf"{n} \%", f"{n}"], [f"{n}%", f"{n} %", f"{n} percent", f"{n}"], [
        f"{n * 10}%", f"{n / 100}%", f"-{n}%", f"{n / 10}"]


def money(rng):
    n = rng.choice([str(rng.randint(1, 999)), f"{rng.randint(1, 99)}.{rng.randint(10, 99)}", grouped(rng.randint(1000, 99999), ",")])
    return rng.choice([n, rf"\${n}", f"${n}"]), [rf"\${n}", f"${n}", rf"{n}\text{{ dollars}}", rf"\$ {n}", f"{n} dollars", rf"{n}\$"], [
        f"${n}", f"{n} dollars", f"{n}$", f"\N{EURO SIGN}{n}"], [f"${n}0".replace(",", ""), f"-${n}", f"{n}x", "$7"]


def scientific(rng):
    m, k = rng.choice([f"{rng.randint(1, 9)}", f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"]), rng.choice([-4, -3, 2, 3, 4, 6, 9, 23])
    value = f"{float(m) * 10 ** k:.0f}" if k > 0 and k < 20 else rf"{m} \times 10^{{{k}}}"
    return rng.choice([rf"{m} \times 10^{{{k}}}", value]), [
        rf"{m} \times 10^{{{k}}}", rf"{m}\times10^{{{k}}}", rf"{m} \cdot 10^{{{k}}}", f"{m}E{k}", f"{m}e{k}", rf"{m} * 10^{{{k}}}", value], [
        f"{m}e{k}", f"{m} * 10^{k}", f"{m}E{k}", value if "\\" not in value else f"{m}e{k}"], [
        rf"{m} \times 10^{{{k + 1}}}", rf"{m} \times 10^{{{-k}}}", m, rf"-{m} \times 10^{{{k}}}"]


def unit(rng):
    n, u, v = rng.choice([str(rng.randint(2, 500)), f"{rng.randint(1, 9)}.5"]), rng.choice(UNITS), rng.choice(UNITS)
    truth = rng.choice([n, rf"{n}\text{{ {u}}}", f"{n} {u}", n])
    return truth, [rf"{n}\text{{ {u}}}", rf"{n} \text{{{u}}}", rf"{n}\,\mathrm{{{u}}}", f"{n} {u}", rf"{n}^\circ", rf"{n}^{{\circ}}", f"{n}°",
                   rf"{n}\text{{ {u}}}^2", rf"{n} \mbox{{ {u}}}^3", rf"{n}\ \text{{{u}}}", rf"{n}\text{{ {v}}}", rf"\text{{{n} {u}}}"], [
        f"{n} {u}", f"{n}{u}", f"{n} {u}^2", f"{n}°"], [rf"{n}0\text{{ {u}}}", rf"-{n}\text{{ {u}}}", rf"\text{{{u}}}", f"{n} x", rf"2{n} {u}"]


def equation(rng):
    name, other = rng.sample(VARIABLES, 2)
    n = rng.choice([str(rng.randint(-50, 99)), fraction(rng, rng.randint(1, 9), 7), r"2\sqrt{3}", "x+1" if name not in "xn" else "5"])
    return rng.choice([n, n, f"{name} = {n}"]), [f"{name} = {n}", f"{name}={n}", rf"{name} = {n}\text{{ cm}}", n, rf"{name} \approx {n}",
                                                 rf"{name} = \boxed{{{n}}}"], ["12"], [
        f"{name} = 1{n}".replace("1-", "-1"), f"{other} = {n}", f"{n} = {name}", f"2{name} = {n}", f"{name} = -({n})", f"{name} > {n}"]


def items(rng) -> list[str]:
    return [rng.choice([str(k), fraction(rng, k, 7) if k % 7 else str(k), rf"{abs(k) + 1}\sqrt{{2}}"])
            for k in rng.sample(range(-9, 20), rng.choice([2, 2, 3]))]


def collection(rng):
    a = items(rng)
    b = rng.sample(a, len(a))
    return rng.choice([",".join(a), ", ".join(a), r"\{" + ", ".join(a) + r"\}"]), [
        ", ".join(a), ",".join(b), r"\{" + ",".join(a) + r"\}", r"\left\{" + ", ".join(b) + r"\right\}", r" \text{ and } ".join(a),
        r"\text{ or }".join(b), " and ".join(a), "x = " + ", ".join(a), ", ".join(f"x = {k}" for k in a), r"x \in \{" + ",".join(a) + r"\}"], [
        "12"], [a[0], ", ".join(a[:-1]), ", ".join(a + ["77"]), ", ".join(["77", *a[1:]]), "(" + ", ".join(a[:1] * 2) + ")"]


def pair(rng):
    a = items(rng)
    return "(" + rng.choice([",", ", "]).join(a) + ")", [
        "(" + ", ".join(a) + ")", "(" + ",".join(a) + ")", r"\left(" + ", ".join(a) + r"\right)", r"\left( " + " , ".join(a) + r" \right)",
        "(x, y) = (" + ", ".join(a) + ")", ", ".join(a), r"(" + r",\,".join(a) + ")"], ["12"], [
        "(" + ", ".join(a[::-1]) + ")", "(" + ", ".join([*a[:-1], "77"]) + ")", a[0], "[" + ", ".join(a) + "]", ", ".join(a[::-1])]


def interval(rng):
    low, high = sorted(rng.sample(range(-9, 20), 2))
    low, high = rng.choice([str(low), r"-\infty"]), rng.choice([str(high), r"\infty", rf"{high + 20}/3"])
    left, right = "(" if "inf" in low else rng.choice("(["), ")" if "inf" in high else rng.choice(")]")
    text = f"{left}{low}, {high}{right}"
    ways = [text, f"{left}{low},{high}{right}", rf"\left{left}{low}, {high}\right{right}", rf"x \in {text}"]
    if rng.random() < 0.3:
        other = f"[{high.replace('/3', '')}0, 999)" if "inf" not in high else f"[-999, {low}0]" if "inf" not in low else "[1, 2]"
        text, ways = rf"{text} \cup {other}", [rf"{way} \cup {other}" for way in ways] + [rf"{other}\cup{text}"]
    swap = str.maketrans("()[]", "[]()")
    return text, ways, ["12"], [text.translate(swap), text.replace(low, "-77"), high, f"{left}{high}, {low}{right}", f"x > {low}"]


def inequality(rng):
    n, sign = rng.randint(-9, 30), rng.choice(["<", ">", r"\le", r"\ge"])
    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
    return f"x {sign} {n}", [f"x {sign} {n}", f"{n} {turned} x", f"x{sign} {n}.0", f"x {sign}{' ' * (sign[0] == chr(92))}{n}",
                             f"x {sign.replace('e', 'eq') if len(sign) > 1 else sign} {n}"], ["12"], [
        f"x {turned} {n}", f"x {sign} {-n or 5}", f"{n} {sign} x", str(n), rf"x \ne {n}"]


def radical(rng):
    c, r = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7, 10, 13])
    pairs = [(rf"\sqrt{{{r}}}", [rf"\sqrt{r}" if r < 10 else rf"\sqrt{{{r}}}", rf"\sqrt {{{r}}}", rf"\frac{{{r}}}{{\sqrt{{{r}}}}}", f"sqrt({r})"]),
             (rf"{c}\sqrt{{{r}}}", [rf"{c} \sqrt{{{r}}}", rf"{c}\cdot\sqrt{{{r}}}", rf"\sqrt{{{c * c * r}}}", rf"{c} \times \sqrt{{{r}}}"]),
             (rf"\frac{{\sqrt{{{r}}}}}{{{c}}}", [rf"\sqrt{{{r}}}/{c}", rf"\frac{{1}}{{{c}}}\sqrt{{{r}}}", rf"\dfrac{{\sqrt{{{r}}}}}{{{c}}}"]),
             (rf"{c}+\sqrt{{{r}}}", [rf"\sqrt{{{r}}} + {c}", rf"{c} + \sqrt{{{r}}}"]),
             (rf"{c}\pm\sqrt{{{r}}}", [rf"{c} \pm \sqrt{{{r}}}", rf"{c}+\sqrt{{{r}}}, {c}-\sqrt{{{r}}}"])]
    truth, ways = rng.choice(pairs)
    return truth, [*ways, truth, truth + r"\text{ cm}"], ["12"], [
        f"-{truth}", truth.replace(str(r), str(r + 1)), rf"{c + 1}\sqrt{{{r}}}", f"{r}", rf"\sqrt[3]{{{r}}}", f"{r ** 0.5:.3f}"]


def pi(rng):
    c, d = rng.randint(2, 30), rng.choice([3, 4, 6, 7])
    truth, ways = rng.choice([
        (rf"{c}\pi", [rf"{c} \pi", f"{c}π", rf"{c}\cdot\pi", rf"{c} \times \pi", rf"{c}.0\pi", rf"\pi \cdot {c}"]),
        (rf"\frac{{\pi}}{{{d}}}", [rf"\pi/{d}", rf"\frac{{1}}{{{d}}}\pi", rf"\dfrac{{\pi}}{{{d}}}", rf"\frac\pi{d}", rf"\frac{{2\pi}}{{{2 * d}}}"]),
        (rf"\frac{{{c}\pi}}{{{d}}}", [rf"\frac{{{c}}}{{{d}}}\pi", rf"{c}\pi/{d}", rf"{c}/{d} \pi"]),
        (rf"{c}+2\pi", [rf"2\pi+{c}", rf"2\pi + {c}"])])
    return truth, [*ways, truth, truth + r"\text{ cm}^2"], ["12"], [
        str(c), f"-{truth}", truth.replace(r"\pi", r"\pi^2"), rf"{c + 1}\pi", f"{c * 3.14159:.2f}"]


def expression(rng):
    a, b, v = rng.randint(2, 9), rng.randint(1, 9), rng.choice("xynabz")
    truth, ways = rng.choice([
        (f"{a}{v}+{b}", [f"{a}{v} + {b}", f"{b}+{a}{v}", f"{b} + {a} {v}", rf"{a}\cdot {v}+{b}", f"y = {a}{v} + {b}" if v != "y" else f"{a}y+{b}"]),
        (f"{v}^2-{a}{v}+{b}", [f"{v}^{{2}} - {a}{v} + {b}", f"{b}+{v}^2-{a}{v}", f"{v}^2 + {b} - {a}{v}"]),
        (f"({v}+{a})({v}-{b})", [f"({v}-{b})({v}+{a})", f"({v} + {a}) ({v} - {b})", f"{v}^2+{a - b}{v}-{a * b}".replace("+-", "-")]),
        (rf"\frac{{{v}+{a}}}{{{b + 1}}}", [f"({v}+{a})/{b + 1}", rf"\frac{{{a}+{v}}}{{{b + 1}}}", rf"\dfrac{{{v} + {a}}}{{{b + 1}}}"]),
        (f"{a}^{{{v}}}", [f"{a}^{v}", f"{a} ^ {{{v}}}"]),
        (rf"\frac{{{a}}}{{{v}}}", [f"{a}/{v}", f"{a}{v}^{{-1}}", rf"\frac{{{2 * a}}}{{2{v}}}"]),
        (rf"{a}e^{{{b}}}", [rf"{a} e^{{{b}}}", f"{a}e^{b}", rf"{a}\cdot e^{b}"])])
    return truth, [*ways, truth], ["12"], [
        truth.replace("+", "-") if "+" in truth else f"-{truth}", truth.replace(str(a), str(a + 1)), f"{a}", truth + "+1", f"{a}{b}"]


def word(rng):
    w, other = rng.sample(WORDS, 2)
    return rng.choice([w, rf"\text{{{w}}}"]), [w, rf"\text{{{w}}}", rf"\textbf{{{w}}}", rf"\text{{ {w} }}", rf"\mathrm{{{w}}}", w.lower(),
                                               rf"\text{{{w.lower()}}}", w.upper()], [w, w.lower()], [other, rf"\text{{{other}}}", w[:-1], "7"]


def choice(rng):
    c, other = rng.sample("ABCDE", 2)
    return rng.choice([c, f"({c})", rf"\text{{({c})}}"]), [c, f"({c})", rf"\text{{{c}}}", rf"\text{{({c})}}", rf"\textbf{{({c})}}", rf"\textbf{{{c}}}",
                                                          rf"\mathrm{{({c})}}", c.lower(), rf"\text{{({c}) }} "], [c, f"({c})"], [
        other, rf"\text{{({other})}}", f"{c}{other}", "3", f"({c}) 5", f"{c}."]


KINDS = {"integer": integer, "negative": negative, "decimal": decimal, "thousands": thousands, "fraction": fractions, "mixed number": mixed,
         "percentage": percent, "money": money, "scientific": scientific, "unit": unit, "equation": equation, "list, set": collection,
         "tuple, pair": pair, "interval, union": interval, "inequality": inequality, "root": radical, "pi": pi, "expression": expression,
         "word": word, "choice": choice}
BOTH = {"integer", "negative", "decimal", "thousands", "fraction", "mixed number", "percentage", "money", "scientific", "unit", "word", "choice"}


def gradings(count: int, seed: int):
    """(kind, style, truth, response), each only once."""
    rng, seen, made = random.Random(seed), set(), 0
    while made < count:
        kind = list(KINDS)[made % len(KINDS)]
        truth, latex, plain, wrong = KINDS[kind](rng)
        prose = kind in BOTH and rng.random() < 0.5
        style, pattern = rng.choice(list((PROSE if prose else MATH).items()))
        answer = rng.choice(wrong) if rng.random() < 0.35 else rng.choice(plain if prose else latex)
        if not prose and "$" in answer.replace("\\$", "") and pattern != r"\boxed{%s}":    # a $ would end the mathematics
            continue
        if (truth, pattern, answer) not in seen:
            seen.add((truth, pattern, answer))
            made += 1
            yield kind, style, truth, pattern.replace("%s", answer)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--count", type=int, default=6000)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--held_out", action="store_true", help="other texts, units, words and letters")
    flags.add_argument("--misses", action="store_true", help="print every grading that math-verify calls right and we do not")
    args = flags.parse_args()
    try:
        from math_verify import parse, verify
    except ImportError:
        print('error: this compares with math-verify: pip install "math-verify[antlr4_13_2]==0.9.*"', file=sys.stderr)
        return 2
    if args.held_out:
        globals().update(HELD_OUT, MATH=HELD_OUT_MATH, PROSE=HELD_OUT_PROSE)
    logging.disable(logging.CRITICAL)           # it warns of every time limit
    rows = list(gradings(args.count, args.seed))
    start = time.process_time()
    ours = [grade(text, truth) for _, _, truth, text in rows]
    spent = time.process_time() - start
    table, start = {}, time.process_time()
    for (kind, style, truth, text), right in zip(rows, ours):
        read = parse(text)
        theirs = bool(verify(parse(f"\\boxed{{{truth}}}"), read))
        outcome = ("both right" if right and theirs else "theirs only" if theirs else "both wrong" if not right else
                   "ours only" if read else "unread, right")
        table.setdefault(kind, Counter())[outcome] += 1
        table[kind]["unread"] += not read
        if outcome == "ours only" or args.misses and outcome in ("theirs only", "unread, right"):
            print(f"{outcome:13s} {kind:16s} truth {truth!r}, response {text!r}: {extract(text)!r} here, {read} there")
    names = ["both right", "both wrong", "ours only", "theirs only", "unread", "unread, right"]
    print(f"\n{'kind':16s} gradings  " + "  ".join(names))
    table["all"] = sum(table.values(), Counter())
    for kind, counts in table.items():
        total = sum(counts[name] for name in names if name != "unread")
        print(f"{kind:16s} {total:8d}  " + "  ".join(f"{counts[name]:{len(name)}d}" for name in names))
    every = table["all"]
    missed = every["theirs only"] / max(every["theirs only"] + every["both right"], 1)
    print(f"\n{args.count} gradings, seed {args.seed}: {every['ours only']} right here alone, {missed:.2%} of what math-verify calls "
          f"right missed; {spent / args.count * 1e6:.0f} us a grading here, {(time.process_time() - start) / args.count * 1e6:.0f} there")
    return int(every["ours only"] > 0 or missed > 0.03)


if __name__ == "__main__":
    sys.exit(main())
