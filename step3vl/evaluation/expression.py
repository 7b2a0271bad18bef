"""Are two short expressions equal? Read by a small grammar, evaluated at a few fixed complex points, compared.

No computer algebra: its worst cases take minutes, and a model can write them. Two expressions that agree at eight
points to nine digits are equal for every purpose of scoring; anything long, deep, huge or unreadable equals nothing.
LaTeX as competitions use it (matrices, sets, intervals, units) is for `math_pool`.
"""

from __future__ import annotations

import cmath
import re
from fractions import Fraction

MAX_CHARACTERS, MAX_DEPTH, DIGITS = 200, 30, 1e-9
FUNCTIONS = {
    "sqrt": cmath.sqrt, "exp": cmath.exp, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "log": cmath.log,
    "ln": cmath.log,
}  # fmt: skip
_POINTS = [cmath.rect(0.5 + 0.19 * k, 1.0 + 2.4 * k) for k in range(8)]  # all round zero, so that branches differ
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|sqrt|exp|sin|cos|tan|log|ln|pi|[A-Za-z]|\*\*|[-+*/^()]")
_LATEX = (
    (r"\\left|\\right|\\[,;! ]|\$", ""),
    (r"\\cdot|\\times", "*"),
    (r"\\(pi|sqrt|sin|cos|tan|log|ln|exp)", r"\1"),
)

Tree = tuple  # ("number", value), ("name", letter), (function, tree) or (operator, left, right)


def is_equal(left: str, right: str) -> bool:
    """True where both can be read and agree; False otherwise, always within milliseconds."""
    a, b = _tokens(left), _tokens(right)
    if not a or not b:
        return False
    if all(re.fullmatch(r"-?(?:\d+(?:\.\d+)?|\.\d+)", "".join(tokens)) for tokens in (a, b)):
        return Fraction("".join(a)) == Fraction("".join(b))
    try:
        trees = [_Reader(tokens).whole() for tokens in (a, b)]
    except ValueError:
        return False
    num_agreed = 0
    for shift in range(len(_POINTS)):
        try:
            one, other = (_evaluate(tree, shift) for tree in trees)
            size = max(abs(one), abs(other), DIGITS)
            if not abs(one - other) <= DIGITS * size:
                return False
            num_agreed += cmath.isfinite(one)
        except (ArithmeticError, ValueError):
            continue
    return num_agreed >= 3


def _tokens(text: str) -> list[str]:
    """[] for what holds anything that the grammar does not know."""
    if len(text) > MAX_CHARACTERS:
        return []
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    for _ in range(5):
        text = re.sub(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"(sqrt|\^)\s?\{([^{}]*)\}", r"\1(\2)", text)
    text = re.sub(r"\s+", "", text)
    tokens = [] if re.search(r"\.\d*\.", text) else _TOKEN.findall(text)
    return tokens if "".join(tokens) == text and all(len(token) <= 30 for token in tokens) else []


class _Reader:
    """Recursive descent: sums of products of powers; a product's sign may be left out."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.place, self.depth = tokens, 0, 0

    def whole(self) -> Tree:
        tree = self._sum()
        if self.place < len(self.tokens):
            raise ValueError("unbalanced")
        return tree

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self.place += 1
        return token

    def _sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        tree = self._product()
        while self._next() in ("+", "-"):
            tree = (self._take(), tree, self._product())
        self.depth -= 1
        return tree

    def _product(self) -> Tree:
        tree = self._signed()
        while (token := self._next()) and token not in ("+", "-", ")"):
            operator = self._take() if token in ("*", "/") else "*"
            tree = (operator, tree, self._signed())
        return tree

    def _signed(self) -> Tree:
        negative = False
        while self._next() in ("+", "-"):
            negative ^= self._take() == "-"
        tree = self._power()
        return ("-", ("number", 0j), tree) if negative else tree

    def _power(self) -> Tree:
        base = self._atom()
        if self._next() not in ("^", "**"):
            return base
        self._take()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        power = ("^", base, self._signed())
        self.depth -= 1
        return power

    def _atom(self) -> Tree:
        token = self._take()
        if token == "(":
            tree = self._sum()
            if self._take() != ")":
                raise ValueError("unbalanced")
            return tree
        if token in FUNCTIONS:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError("too deep")
            tree = (token, self._atom())
            self.depth -= 1
            return tree
        if token in ("pi", "e"):
            return ("number", complex(cmath.pi if token == "pi" else cmath.e))
        if token.isalpha():
            return ("name", token)
        if token[:1].isdigit() or token[:1] == ".":
            return ("number", complex(token))
        raise ValueError("nothing to read")


def _evaluate(tree: Tree, shift: int) -> complex:
    match tree:
        case ("number", value):
            return value
        case ("name", letter):
            return _POINTS[(ord(letter) * 3 + shift) % len(_POINTS)] * (1 + ord(letter) / 1000)
        case (function, inner):
            return FUNCTIONS[function](_evaluate(inner, shift))
    operator, left, right = tree
    a, b = _evaluate(left, shift), _evaluate(right, shift)
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "/":
            return a / b
    return a**b
