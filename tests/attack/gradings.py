r"""Gradings to compare verifiers on: a truth, and a response that gives it or something near.

The truth is drawn from a kind of answer; the response is one way to write it, or something near (other sign, ten times
as much, a part of it, swapped), in a style: a box, $...$, prose, bold, ####. Two styles put in front of the answer what
must not be taken for it.
"""
import random

MATH = {        # for LaTeX
    "box": r"So the answer is $\boxed{%s}$.",
    "box alone": r"\boxed{%s}",
    "box in braces": r"Hence \boxed{{%s}}.",
    "box in display": "We add 3 and 4.\n\\[\\boxed{%s}\\]",
    "box and more": "\\boxed{%s} since $3 + 4 = 7$ and 2 < 3.",
    "two boxes": r"First $\boxed{17}$ for a part of it, and after a good deal of further work, $\boxed{%s}$.",
    "dollars": "Adding 3 and 4, then, we get $%s$.",
    "answer dollars": "The answer is $%s$.",
    "answer dollars more": "The answer is $%s$, since 3 of the 12 are gone.",
    "display": "We get\n\\[ %s \\]",
    "double dollars": "It follows that $$%s$$",
    "parentheses": r"With 12 of them we find \(%s\).",
    "final dollars": "Final Answer: The final answer is $%s$. I hope it is correct."}
PROSE = {       # for numbers and words as people write them
    "answer": "The answer is %s.",
    "Answer:": "12 - 3 = 9\nAnswer: %s",
    "bold": "**%s**",
    "answer bold": "The answer is **%s**.",
    "hash": "She buys 3 bags of 4 = 12 pears.\n#### %s",
    "last": "Of 12 bags 3 are gone, so in total it is %s.",
    "alone": "%s",
    "line": "3 * 4 = 12\n12 + 5 = 17\nSo we are left with\n%s",
    "equals": "12 - 3 - 4 = %s",
    "answer more": "The answer is %s, because 3 of them were lost.",
    "final": "**Final answer:** %s",
    "exclaimed": "Together they have %s!",
    "x equals": "Hence x = %s."}
UNITS = """cm/m/km/kg/degrees/mph/feet/hours/minutes/dollars/square units/inches/apples/books""".split("/")
WORDS = "Monday/Yes/no/blue/Alice/right triangle/No solution/even/True/infinitely many".split("/")
NAMES = ["x", "y", "n", r"\theta", "A", "f(x)", "x_1", r"\text{Area}", "AB"]

HELD_OUT_MATH = {
    "solution": "Let $x$ be the pears. Then $2x + 3 = 17$, so $x = 7$.\n\nThus the final answer is $\\boxed{%s}$.",
    "thinking": "<think>\nMaybe \\boxed{31}? No: 4 * 8 = 32.\n</think>\n\n**Answer:** \\(\\boxed{%s}\\)",
    "aligned": "$$\\begin{aligned} a &= 2 + 3 \\\\ b &= 5 \\end{aligned}$$ Therefore, $$\\boxed{%s}.$$",
    "short": "$\\boxed{%s}$",
    "wide box": "\\[\n\\boxed{ %s }\n\\]",
    "bold box": "**Final Answer**\n\n$\\boxed{%s}$",
    "numbered": "1. Add $3$ and $4$.\n2. Double it.\n3. The result is $%s$.",
    "colon": "Answer: $%s$",
    "tight display": "\\[%s\\]",
    "claim": "Since $17 > 12$, the value we look for is \\(%s\\), as claimed.",
    "then more": "The correct answer is $%s$. Note that $2 + 2 = 4$ in any case."}
HELD_OUT_PROSE = {
    "so": "First there were 24, then 7 went away. So there are %s",
    "answer colon bold": "**Answer:** %s",
    "comma": "In the end, %s, as 9 > 8.",
    "hash last": "5 + 6 = <<5+6=11>>11 eggs.\nTwice that is 22.\n#### %s",
    "heading": "### Answer\n%s",
    "equation": "8 x 4 = %s",
    "answer would be": "The answer would be %s if 5 were left.",
    "final answer is": "The final answer is %s.",
    "list": "- 4 cats\n- 6 dogs\n\nTotal: %s",
    "must": "Then Tom must have paid %s in total.",
    "therefore": "Therefore, the total is **%s**.",
    "sum": "24 - 7 = 17\n17 + 3 = %s"}
HELD_OUT = {
    "MATH": HELD_OUT_MATH, "PROSE": HELD_OUT_PROSE,
    "UNITS": "mm/yards/liters/seconds/days/cents/gallons/students/miles/ounces/people/m/s/weeks".split("/"),
    "WORDS": "Friday/red/odd/Carlos/rectangle/undefined/None/convergent/not possible/Jane/isosceles".split("/"),
    "NAMES": ["y", "t", "k", r"\alpha", "B", "g(x)", "a_n", r"\text{Total}", "CD", "x_{1}"]}


# A kind of answer: rng -> truth, ways to write it in LaTeX, ways to write it in prose, and what is near but wrong

def integer(rng):
    n = rng.choice([rng.randint(2, 99), rng.randint(100, 99999)])
    plain = [str(n), f"{n}.0", f"{n}.00"]
    return (str(n), [*plain, f"+{n}", f"0{n}", rf"\text{{{n}}}", rf"\textbf{{{n}}}", rf"\mathbf{{{n}}}"], plain,
            [str(-n), str(n * 10), str(n + 1), f"{n}.5", str(n // 10 or 5), f"{n}x"])


def negative(rng):
    n = rng.randint(1, 999)
    return (f"-{n}", [f"-{n}", f"- {n}", f"-{n}.0", f"\N{MINUS SIGN}{n}"], [f"-{n}", f"-{n}.0"],
            [str(n), str(-n * 10), f"-{n}.5"])


def decimal(rng):
    n, d = rng.randint(0, 99), rng.randint(1, 99)
    text = f"{n}.{d:02}"
    return (text, [text, text + "0", "0" + text, f"{n * 100 + d}/100"], [text, text + "0"],
            [f"-{text}", f"{n}.{d:02}7", f"{n}{d:02}", str(n), f"0.{n}{d:02}"])


def thousands(rng):
    n = rng.choice([rng.randint(1000, 9999), rng.randint(10**4, 10**6), rng.randint(10**6, 10**9)])
    ways = [f"{n:,}".replace(",", c) for c in (",", "{,}", r"\,", r"\!,", r",\!", " ", r"\ ", "~", ", ")]
    return (rng.choice([str(n), f"{n:,}"]), [*ways, str(n), f"{n:,}.0"], [str(n), f"{n:,}", f"{n:,}".replace(",", " ")],
            [f"{n:,}"[:-4], str(n)[-3:], f"{n * 10:,}", f"({n:,})"])


def written(rng, a: int, b: int) -> str:
    """a / b"""
    sign, a = "-" * (a < 0), abs(a)
    ways = [rf"{sign}\frac{{{a}}}{{{b}}}", rf"{sign}\dfrac{{{a}}}{{{b}}}", rf"{sign}\tfrac{{{a}}}{{{b}}}",
            f"{sign}{a}/{b}", rf"\frac{{{sign}{a}}}{{{b}}}", rf"{sign}\frac {{{a}}} {{{b}}}"]
    return rng.choice(ways + [rf"{sign}\frac{a}{b}"] * (a < 10 and b < 10))


def fraction(rng):
    b = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 64])
    a = rng.choice([-1, 1]) * rng.choice([k for k in range(1, 30) if k % b])
    right = [*(written(rng, a, b) for _ in range(4)), written(rng, 2 * a, 2 * b)]
    if b in (2, 4, 5, 8, 10, 25):
        right.append(f"{a / b}")
    elif rng.random() < 0.1:
        right.append(f"{a / b:.6f}")            # rounded: right there, never here
    return (written(rng, a, b), right, [f"{a}/{b}"] + [f"{a / b}"] * (b in (2, 4, 5)),
            [written(rng, b, abs(a)), written(rng, -a, b), str(a), f"3 {abs(a)}/{b}", f"{a / b:.2f}"])


def mixed(rng):
    w, b = rng.randint(1, 12), rng.choice([2, 3, 4, 5, 8])
    a = rng.randint(1, b - 1)
    whole = w * b + a
    truth = rng.choice([rf"{w}\frac{{{a}}}{{{b}}}", rf"\frac{{{whole}}}{{{b}}}", f"{whole}/{b}", f"{w} {a}/{b}"])
    ways = [rf"{w}\frac{a}{b}", rf"{w}\frac{{{a}}}{{{b}}}", rf"{w} \frac{{{a}}}{{{b}}}", rf"{w}\,\dfrac{{{a}}}{{{b}}}",
            f"{w} {a}/{b}", rf"\frac{{{whole}}}{{{b}}}", rf"{w}+\frac{{{a}}}{{{b}}}"]
    return (truth, ways, [f"{w} {a}/{b}", f"{whole}/{b}", rf"{w}\frac{{{a}}}{{{b}}}"],
            [f"{a}/{b}", str(w), f"{w * a}/{b}", f"{w + 1} {a}/{b}", rf"-{w}\frac{{{a}}}{{{b}}}"])


def percentage(rng):
    n = rng.choice([rng.randint(1, 250), rng.randint(1, 99) + 0.5])
    return (rng.choice([f"{n}", rf"{n}\%", f"{n}%", f"{n / 100}"]),
            [rf"{n}\%", f"{n}%", rf"{n}\text{{ percent}}", rf"{n} \%", f"{n}"],
            [f"{n}%", f"{n} %", f"{n} percent", f"{n}"], [f"{n * 10}%", f"{n / 100}%", f"-{n}%", f"{n / 10}"])


def money(rng):
    n = rng.choice([str(rng.randint(1, 999)), f"{rng.randint(1, 99)}.{rng.randint(10, 99)}",
                    f"{rng.randint(1000, 99999):,}"])
    return (rng.choice([n, rf"\${n}", f"${n}"]),
            [rf"\${n}", f"${n}", rf"{n}\text{{ dollars}}", rf"\$ {n}", f"{n} dollars", rf"{n}\$"],
            [f"${n}", f"{n} dollars", f"{n}$", f"\N{EURO SIGN}{n}"],
            [f"${n}0".replace(",", ""), f"-${n}", f"{n}x", "$7"])


def scientific(rng):
    m = rng.choice([f"{rng.randint(1, 9)}", f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"])
    k = rng.choice([-4, -3, 2, 3, 4, 6, 9, 23])
    power = rf"{m} \times 10^{{{k}}}"
    value = f"{float(m) * 10 ** k:.0f}" if 0 < k < 20 else power
    return (rng.choice([power, value]),
            [power, rf"{m}\times10^{{{k}}}", rf"{m} \cdot 10^{{{k}}}", f"{m}E{k}", f"{m}e{k}", rf"{m} * 10^{{{k}}}",
             value],
            [f"{m}e{k}", f"{m} * 10^{k}", f"{m}E{k}", value if "\\" not in value else f"{m}e{k}"],
            [rf"{m} \times 10^{{{k + 1}}}", rf"{m} \times 10^{{{-k}}}", m, "-" + power])


def unit(rng):
    n, u, v = rng.choice([str(rng.randint(2, 500)), f"{rng.randint(1, 9)}.5"]), rng.choice(UNITS), rng.choice(UNITS)
    return (rng.choice([n, rf"{n}\text{{ {u}}}", f"{n} {u}", n]),
            [rf"{n}\text{{ {u}}}", rf"{n} \text{{{u}}}", rf"{n}\,\mathrm{{{u}}}", f"{n} {u}", rf"{n}^\circ",
             rf"{n}^{{\circ}}", f"{n}°", rf"{n}\text{{ {u}}}^2", rf"{n} \mbox{{ {u}}}^3", rf"{n}\ \text{{{u}}}",
             rf"{n}\text{{ {v}}}", rf"\text{{{n} {u}}}"],
            [f"{n} {u}", f"{n}{u}", f"{n} {u}^2", f"{n}°"],
            [rf"{n}0\text{{ {u}}}", rf"-{n}\text{{ {u}}}", rf"\text{{{u}}}", f"{n} x", rf"2{n} {u}"])


def equation(rng):
    name, other = rng.sample(NAMES, 2)
    n = rng.choice([str(rng.randint(-50, 99)), written(rng, rng.randint(1, 9), 7), r"2\sqrt{3}",
                    "x+1" if name not in "xn" else "5"])
    return (rng.choice([n, n, f"{name} = {n}"]),
            [f"{name} = {n}", f"{name}={n}", rf"{name} = {n}\text{{ cm}}", n, rf"{name} \approx {n}",
             rf"{name} = \boxed{{{n}}}"], [],
            [f"{name} = 1{n}".replace("1-", "-1"), f"{other} = {n}", f"{n} = {name}", f"2{name} = {n}",
             f"{name} = -({n})", f"{name} > {n}"])


def items(rng) -> list[str]:
    return [rng.choice([str(k), written(rng, k, 7) if k % 7 else str(k), rf"{abs(k) + 1}\sqrt{{2}}"])
            for k in rng.sample(range(-9, 20), rng.choice([2, 2, 3]))]


def collection(rng):
    a = items(rng)
    b = rng.sample(a, len(a))
    return (rng.choice([",".join(a), ", ".join(a), r"\{" + ", ".join(a) + r"\}"]),
            [", ".join(a), ",".join(b), r"\{" + ",".join(a) + r"\}", r"\left\{" + ", ".join(b) + r"\right\}",
             r" \text{ and } ".join(a), r"\text{ or }".join(b), " and ".join(a), "x = " + ", ".join(a),
             ", ".join(f"x = {k}" for k in a), r"x \in \{" + ",".join(a) + r"\}"], [],
            [a[0], ", ".join(a[:-1]), ", ".join(a + ["77"]), ", ".join(["77", *a[1:]]), f"({a[0]}, {a[0]})"])


def ordered(rng):
    a = items(rng)
    return ("(" + rng.choice([",", ", "]).join(a) + ")",
            ["(" + ", ".join(a) + ")", "(" + ",".join(a) + ")", r"\left(" + ", ".join(a) + r"\right)",
             r"\left( " + " , ".join(a) + r" \right)", "(x, y) = (" + ", ".join(a) + ")", ", ".join(a),
             "(" + r",\,".join(a) + ")"], [],
            ["(" + ", ".join(a[::-1]) + ")", "(" + ", ".join([*a[:-1], "77"]) + ")", a[0], "[" + ", ".join(a) + "]",
             ", ".join(a[::-1])])


def interval(rng):
    low, high = sorted(rng.sample(range(-9, 20), 2))
    low, high = rng.choice([str(low), r"-\infty"]), rng.choice([str(high), r"\infty", rf"{high + 20}/3"])
    left, right = "(" if "inf" in low else rng.choice("(["), ")" if "inf" in high else rng.choice(")]")
    text = f"{left}{low}, {high}{right}"
    ways = [text, f"{left}{low},{high}{right}", rf"\left{left}{low}, {high}\right{right}", rf"x \in {text}"]
    if rng.random() < 0.3:
        other = f"[{high.split('/')[0]}0, 999)" if "inf" not in high else "[-999, -99]"
        text, ways = rf"{text} \cup {other}", [rf"{way} \cup {other}" for way in ways] + [rf"{other}\cup{text}"]
    return (text, ways, [], [text.translate(str.maketrans("()[]", "[]()")), text.replace(low, "-77"), high,
                             f"{left}{high}, {low}{right}", f"x > {low}"])


def inequality(rng):
    n, sign = rng.randint(-9, 30), rng.choice(["<", ">", r"\le", r"\ge"])
    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
    return (f"x {sign} {n}",
            [f"x {sign} {n}", f"{n} {turned} x", f"x{sign} {n}.0", f"x {sign.replace('e', 'eq')} {n}"], [],
            [f"x {turned} {n}", f"x {sign} {-n or 5}", f"{n} {sign} x", str(n), rf"x \ne {n}"])


def root(rng):
    c, r = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7, 10, 13])
    one = rf"\sqrt{{{r}}}"
    truth, ways = rng.choice([
        (one, [rf"\sqrt{r}" if r < 10 else one, rf"\sqrt {{{r}}}", rf"\frac{{{r}}}{{{one}}}", f"sqrt({r})"]),
        (rf"{c}{one}", [rf"{c} {one}", rf"{c}\cdot{one}", rf"\sqrt{{{c * c * r}}}", rf"{c} \times {one}"]),
        (rf"\frac{{{one}}}{{{c}}}", [rf"{one}/{c}", rf"\frac{{1}}{{{c}}}{one}", rf"\dfrac{{{one}}}{{{c}}}"]),
        (rf"{c}+{one}", [rf"{one} + {c}", rf"{c} + {one}"]),
        (rf"{c}\pm{one}", [rf"{c} \pm {one}", rf"{c}+{one}, {c}-{one}"])])
    return (truth, [*ways, truth, truth + r"\text{ cm}"], [],
            [f"-{truth}", truth.replace(str(r), str(r + 1)), rf"{c + 1}{one}", f"{r}", rf"\sqrt[3]{{{r}}}",
             f"{r ** 0.5:.3f}"])


def pi(rng):
    c, d = rng.randint(2, 30), rng.choice([3, 4, 6, 7])
    truth, ways = rng.choice([
        (rf"{c}\pi", [rf"{c} \pi", f"{c}π", rf"{c}\cdot\pi", rf"{c} \times \pi", rf"{c}.0\pi", rf"\pi \cdot {c}"]),
        (rf"\frac{{\pi}}{{{d}}}", [rf"\pi/{d}", rf"\frac{{1}}{{{d}}}\pi", rf"\dfrac{{\pi}}{{{d}}}", rf"\frac\pi{d}",
                                   rf"\frac{{2\pi}}{{{2 * d}}}"]),
        (rf"\frac{{{c}\pi}}{{{d}}}", [rf"\frac{{{c}}}{{{d}}}\pi", rf"{c}\pi/{d}", rf"{c}/{d} \pi"]),
        (rf"{c}+2\pi", [rf"2\pi+{c}", rf"2\pi + {c}"])])
    return (truth, [*ways, truth, truth + r"\text{ cm}^2"], [],
            [str(c), f"-{truth}", truth.replace(r"\pi", r"\pi^2"), rf"{c + 1}\pi", f"{c * 3.14159:.2f}"])


def expression(rng):
    a, b, v = rng.randint(2, 9), rng.randint(1, 9), rng.choice("xynabz")
    truth, ways = rng.choice([
        (f"{a}{v}+{b}", [f"{a}{v} + {b}", f"{b}+{a}{v}", f"{b} + {a} {v}", rf"{a}\cdot {v}+{b}",
                         f"y = {a}{v} + {b}" if v != "y" else f"{a}y+{b}"]),
        (f"{v}^2-{a}{v}+{b}", [f"{v}^{{2}} - {a}{v} + {b}", f"{b}+{v}^2-{a}{v}", f"{v}^2 + {b} - {a}{v}"]),
        (f"({v}+{a})({v}-{b})", [f"({v}-{b})({v}+{a})", f"({v} + {a}) ({v} - {b})",
                                 f"{v}^2+{a - b}{v}-{a * b}".replace("+-", "-")]),
        (rf"\frac{{{v}+{a}}}{{{b + 1}}}", [f"({v}+{a})/{b + 1}", rf"\frac{{{a}+{v}}}{{{b + 1}}}",
                                           rf"\dfrac{{{v} + {a}}}{{{b + 1}}}"]),
        (f"{a}^{{{v}}}", [f"{a}^{v}", f"{a} ^ {{{v}}}"]),
        (rf"\frac{{{a}}}{{{v}}}", [f"{a}/{v}", f"{a}{v}^{{-1}}", rf"\frac{{{2 * a}}}{{2{v}}}"]),
        (rf"{a}e^{{{b}}}", [rf"{a} e^{{{b}}}", f"{a}e^{b}", rf"{a}\cdot e^{b}"])])
    return (truth, [*ways, truth], [], [truth.replace("+", "-") if "+" in truth else f"-{truth}",
                                        truth.replace(str(a), str(a + 1)), f"{a}", truth + "+1", f"{a}{b}"])


def word(rng):
    w, other = rng.sample(WORDS, 2)
    return (rng.choice([w, rf"\text{{{w}}}"]),
            [w, rf"\text{{{w}}}", rf"\textbf{{{w}}}", rf"\text{{ {w} }}", rf"\mathrm{{{w}}}", w.lower(),
             rf"\text{{{w.lower()}}}", w.upper()], [w, w.lower()], [other, rf"\text{{{other}}}", w[:-1], "7"])


def choice(rng):
    c, other = rng.sample("ABCDE", 2)
    return (rng.choice([c, f"({c})", rf"\text{{({c})}}"]),
            [c, f"({c})", rf"\text{{{c}}}", rf"\text{{({c})}}", rf"\textbf{{({c})}}", rf"\textbf{{{c}}}",
             rf"\mathrm{{({c})}}", c.lower(), rf"\text{{({c}) }} "], [c, f"({c})"],
            [other, rf"\text{{({other})}}", f"{c}{other}", "3", f"({c}) 5", f"{c}."])


KINDS = {"integer": integer, "negative": negative, "decimal": decimal, "thousands": thousands, "fraction": fraction,
         "mixed number": mixed, "percentage": percentage, "money": money, "scientific": scientific, "unit": unit,
         "equation": equation, "list, set": collection, "tuple, pair": ordered, "interval, union": interval,
         "inequality": inequality, "root": root, "pi": pi, "expression": expression, "word": word, "choice": choice}


def gradings(count: int, seed: int, held_out: bool = False):
    """`count` times (kind, truth, response), no two alike. held_out: other texts, units, words and letters."""
    if held_out:
        globals().update(HELD_OUT)
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        kind = list(KINDS)[len(seen) % len(KINDS)]
        truth, latex, plain, near = KINDS[kind](rng)
        prose = bool(plain) and rng.random() < 0.5
        pattern = rng.choice(list((PROSE if prose else MATH).values()))
        answer = rng.choice(near if rng.random() < 0.35 else plain if prose else latex)
        text = pattern.replace("%s", answer)
        broken = not prose and "$" in answer.replace("\\$", "") and pattern != r"\boxed{%s}"     # $5 inside $...$
        if not broken and (truth, text) not in seen:
            seen.add((truth, text))
            yield kind, truth, text
