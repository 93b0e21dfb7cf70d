r"""Sums of products over the fractions: the mathematics that answers are compared in. Exact, bounded, nothing executed.

A sum is a dict {(root, powers): coefficient}: the sum of coefficient * sqrt(root) * product of name ** exponent, where
`root` is a square-free whole number, `powers` are sorted (name, exponent) pairs, no coefficient is 0. So equal sums
are equal dicts: \frac{2}{\sqrt2} + x \cdot x and x^2 + \sqrt2 both are {(2, ()): 1, (1, (("x", 2),)): 1}.

What cannot be multiplied out (the root or the sine of a sum, one over a sum, x^n) is a letter with a long name. So
equal sums are equal numbers whatever the letters stand for, but equal numbers may be different sums: (x^2-1)/(x-1) and
x+1.
"""
import re
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt

LONGEST, DEEPEST, TERMS, BITS = 300, 12, 60, 2000       # characters, brackets, terms, size of a number; beyond: Unread
LETTER = re.compile(r"[a-zI]|\\(?:pi|infty|alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho)")
FUNCTIONS = {r"\sin", r"\cos", r"\tan", r"\ln", r"\log"}
WHOLE, NUMERAL = re.compile("[0-9]+"), re.compile(r"\.?[0-9]")
ONE = (1, ())


class Unread(ValueError):
    """This is not mathematics that is read here."""


def _number(sum_: dict) -> Fraction | None:
    return sum_.get(ONE, 0) if not sum_.keys() - {ONE} else None


def value_of(sum_: dict):
    if (number := _number(sum_)) is not None:
        return number
    ((root, powers), coefficient), *rest = sum_.items()
    if not rest and root == coefficient == 1 and len(powers) == 1 and powers[0][1] == 1:
        return powers[0][0]                                 # one letter, as \text{B} gives it
    return frozenset(sum_.items())


def _letter(name: str) -> dict:
    return {(1, ((name, 1),)): 1}


def _name(sum_: dict) -> str:
    """What cannot be multiplied out is a letter with a long name."""
    name = str(sorted((root, powers, str(coefficient)) for (root, powers), coefficient in sum_.items()))
    if len(name) > LONGEST:
        raise Unread
    return name


def _add(a: dict, b: dict, sign: int = 1) -> dict:
    if not a and sign == 1:
        return b
    total = dict(a)
    for key, coefficient in b.items():
        total[key] = total.get(key, 0) + sign * coefficient
        if not total[key]:
            del total[key]
    return total


def _multiply(a: dict, b: dict) -> dict:
    total = {}
    if a.keys() == b.keys() == {ONE}:                       # numbers, the usual case
        product = a[ONE] * b[ONE]
        if max(product.numerator, product.denominator).bit_length() > BITS:
            raise Unread
        return {ONE: product}
    for (root, powers), c in a.items():
        for (root2, powers2), c2 in b.items():
            shared = gcd(root, root2)
            exponents = dict(powers)
            for name, exponent in powers2:
                exponents[name] = exponents.get(name, 0) + exponent
            key = root * root2 // shared ** 2, tuple(sorted((n, e) for n, e in exponents.items() if e))
            total[key] = total.get(key, 0) + c * c2 * shared
            if len(total) > TERMS or max(total[key].numerator, total[key].denominator, key[0]).bit_length() > BITS:
                raise Unread
    return {key: c for key, c in total.items() if c}


def _invert(a: dict) -> dict:
    if not a:
        raise Unread
    if len(a) == 2 and not any(powers for _, powers in a):      # 1 / (p + q) = (p - q) / (p^2 - q^2)
        (key, c), (key2, c2) = a.items()
        return _multiply({key: c, key2: -c2}, {ONE: Fraction(1, c * c * key[0] - c2 * c2 * key2[0])})
    if len(a) > 1:
        return {(1, ((_name(a), -1),)): 1}
    ((root, powers), c), = a.items()
    return {(root, tuple((name, -exponent) for name, exponent in powers)): Fraction(1, c * root)}


@lru_cache(1024)
def _square_free(n: int) -> tuple[int, int]:
    """(s, r) with n = s * s * r and r square-free."""
    if isqrt(n) ** 2 == n:
        return isqrt(n), 1
    if n > 10 ** 6:
        raise Unread
    square = 1
    for d in range(2, isqrt(n) + 1):
        while n % (d * d) == 0:
            n, square = n // (d * d), square * d
    return square, n


def _root(a: dict) -> dict:
    number = _number(a)
    if number is None:
        return _letter("root" + _name(a))
    if number < 0:
        raise Unread
    square, free = _square_free(number.numerator * number.denominator)
    return {(free, ()): Fraction(square, number.denominator)} if number else {}


def _power(base: dict, exponent: dict) -> dict:
    n = _number(exponent)
    if n is not None and n.denominator == 1 and abs(n) <= 2 * TERMS:
        result = {ONE: 1}
        for _ in range(abs(int(n))):
            result = _multiply(result, base)
        return result if n >= 0 else _invert(result)
    if n == Fraction(1, 2):
        return _root(base)
    return _letter(f"{_name(base)}^{_name(exponent)}")


class Reader:
    """Reads tokens as a sum. A product without a sign binds closer than / and *, as in math-verify: 1/2x = 1/(2x)."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.i, self.depth = [*tokens, "", ""], 0, 0

    def take(self, token: str) -> bool:
        taken = self.tokens[self.i] == token
        self.i += taken
        return taken

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise Unread

    def whole(self) -> dict:
        total = self.sum()
        self.expect("")
        return total

    def sum(self) -> dict:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unread
        sign = -1 if self.take("-") else 1
        self.take("+") if sign == 1 else None
        total = _add({}, self.product(), sign)
        while self.tokens[self.i] in ("+", "-"):
            sign = 1 if self.take("+") or not self.take("-") else -1
            total = _add(total, self.product(), sign)
        self.depth -= 1
        return total

    def product(self) -> dict:
        if (mixed := self.mixed()) is not None:
            return mixed
        total = self.factors()
        while self.tokens[self.i] in ("*", "/"):
            inverse = not self.take("*") and self.take("/")
            sign = -1 if self.take("-") else 1
            factor = _add({}, self.factors(), sign)
            total = _multiply(total, _invert(factor) if inverse else factor)
        return total

    def mixed(self) -> dict | None:
        """3\\frac{1}{2}, a whole number and a fraction of whole numbers, is their sum, where nothing follows."""
        i, t = self.i, self.tokens[self.i:self.i + 9]
        if not (WHOLE.fullmatch(t[0]) and t[1:3] == [r"\frac", "{"]):
            return None
        if t[4:6] == ["}", "{"] and t[7:8] == ["}"] and WHOLE.fullmatch(t[3]) and WHOLE.fullmatch(t[6]):
            if t[8] not in ("", "+", "-", ")", "]", "}") or max(map(len, t)) > LONGEST:
                raise Unread
            self.i = i + 8
            return {ONE: int(t[0]) + Fraction(int(t[3]), int(t[6]))} if int(t[0]) or int(t[3]) else {}
        return None

    def factors(self) -> dict:
        total, before = self.factor(), self.tokens[self.i - 1]
        while self.tokens[self.i] not in ("", "+", "-", "*", "/", ")", "}", "]"):
            first = self.tokens[self.i]
            if NUMERAL.match(first) or first == "(" and before in ("f", "g", "h"):
                raise Unread                                # `1 2`, 2\frac{1}{2}3, f(x)
            factor = self.factor()
            if first in ("(", r"\frac") and _number(total) is not None and _number(factor) is not None:
                raise Unread                                # 2(3), 0.5\frac12
            total, before = _multiply(total, factor), self.tokens[self.i - 1]
        return total

    def factor(self) -> dict:
        base = self.base()
        if self.take("^"):
            base = _power(base, self.argument())
            if self.tokens[self.i] == "^":
                raise Unread                                # 2^3^2
        return base

    def argument(self, letters: bool = True) -> dict:
        token = self.tokens[self.i]
        if token == "{" or NUMERAL.match(token) or letters and LETTER.fullmatch(token):
            return self.base()
        raise Unread                                    # \frac\pi2

    def base(self) -> dict:
        token = self.tokens[self.i]
        self.i += 1
        if NUMERAL.match(token):
            number = Fraction(token) if "." in token else int(token)
            return {ONE: number} if number else {}
        if len(token) == 1 and token != "I":
            token = token.lower()
        if LETTER.fullmatch(token):
            return _letter(token)
        if token in ("(", "{"):
            total = self.sum()
            self.expect(")" if token == "(" else "}")
            return total
        if token == r"\frac":
            over, under = self.argument(letters=False), self.argument(letters=False)
            return _multiply(over, _invert(under))
        if token == r"\sqrt" and self.tokens[self.i] == "{":
            return _root(self.argument())
        if token == r"\sqrt" and (degree := re.fullmatch(r"\[([3-9])\]", "".join(self.tokens[self.i:self.i + 3]))):
            self.i += 3
            return _letter(f"root{degree[1]}{_name(self.argument())}")
        if token in FUNCTIONS and (self.tokens[self.i] in ("(", "{")
                                   or self.tokens[self.i + 1] in ("", "+", "-", ")", "}")):
            return _letter(token + _name(self.base()))  # \sin 2x stays text
        raise Unread
