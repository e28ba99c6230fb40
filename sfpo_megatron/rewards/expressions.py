r"""Reads one expression in LaTeX or plain notation into sympy, evaluated, with limits on its size.

A descent parser: `sum = product (+- product)*`, `product = power (* / or nothing, power)*`. It
refuses what it does not know in full, so nothing is dropped on the way, and what would be huge:
powers above MAX_BITS, factorials above MAX_FACTORIAL. Nothing of the text is ever run as program
code. A number behind a factor without a sign between them (`7 8`, `x2`) is no expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from sfpo_megatron.rewards import numbers
from sfpo_megatron.rewards.screen import MAX_EXPONENT, MAX_FACTORIAL

if TYPE_CHECKING:
    from sympy import Expr

MAX_BITS = 20_000
MAX_POWERS = 4

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<power>[eE][-+]?[0-9]{1,4})?(?![0-9.])|"
    r"(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_!(){}\[\]|'%]))"
)
_GREEK = set(
    re.findall(
        r"\w+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
        "xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma "
        "Phi Psi Omega ell hbar",
    )
)
_FUNCTIONS = {
    name: name
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")
} | {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "log": "log", "lg": "log10",
    "asin": "asin", "acos": "acos", "atan": "atan", "gcd": "gcd", "lcm": "lcm",
    "min": "Min", "max": "Max",
}  # fmt: skip
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
_MARKS = {"overline", "bar", "hat", "vec", "tilde", "overrightarrow", "widehat"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class Unreadable(ValueError):
    """The text is no expression that this module knows."""


def is_word(letters: str) -> bool:
    """Whether a run of letters is a word and not a product of variables (`listen`; `xyz`)."""
    if len(letters) == 1 or letters in ("pi",):
        return False
    low = letters.lower()
    if len(low) == 2:
        return low in ("no", "on", "is", "it", "at", "or", "if", "as", "we", "up")
    used = sorted(set(low))
    return ord(used[-1]) - ord(used[0]) > len(low) or len(low) > 6


def expression(text: str) -> Expr:
    """The expression that the whole of `text` is; Unreadable if it is none."""
    try:
        return _Parser(text).whole()
    except (RecursionError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise Unreadable(type(error).__name__) from error
    except (TypeError, AttributeError, ValueError) as error:  # of sympy, about an odd argument
        raise Unreadable(str(error)) from error


class _Parser:
    def __init__(self, text: str) -> None:
        import sympy

        self.sympy = sympy
        self.tokens: list[tuple[str, str]] = []
        index, text = 0, text.rstrip()
        while index < len(text):
            found = _TOKEN.match(text, index)
            if found is None:
                raise Unreadable(text[index : index + 20])
            index = found.end()
            kind = found.lastgroup or ""
            if found["number"]:
                self.tokens.append(("number", found["number"] + (found["power"] or "")))
            elif kind == "letters":
                self._add_letters(found["letters"])
            else:
                self.tokens.append((kind, found[kind]))
        self.at = 0
        self.powers = 0
        self.bars = 0

    def _add_letters(self, letters: str) -> None:
        if letters in _FUNCTIONS or letters == "pi":
            self.tokens.append(("command", "\\" + letters))
        elif is_word(letters):
            raise Unreadable(f"the word {letters}")
        else:
            self.tokens += [("letter", letter) for letter in letters]

    # ---- the grammar ---------------------------------------------------------------------------

    def whole(self) -> Expr:
        value = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(self.text)
        return value

    @property
    def text(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, text: str) -> bool:
        if self.text != text or not text:
            return False
        self.at += 1
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"no {text}")

    def sum(self) -> Expr:
        terms = [self.signed()]
        while self.text in ("+", "-"):
            terms.append(self.signed())
        return self.sympy.Add(*terms)

    def signed(self) -> Expr:
        negative = False
        while self.text in ("+", "-"):
            negative ^= self.text == "-"
            self.at += 1
        value = self.product()
        return -value if negative else value

    def product(self, *, of_function: bool = False) -> Expr:
        value = self.power()
        while True:
            if self.text in ("*", r"\cdot", r"\times", r"\ast") and not of_function:
                self.at += 1
                negative = self.take("-")
                factor = self.power()
                value = value * (-factor if negative else factor)
            elif self.text in ("/", r"\div"):
                self.at += 1
                value = self._divided(value, self.power())
            elif self._starts_factor() and not (of_function and self._is_function()):
                if self.kind == "number" or (value.is_number and self.text == r"\frac"):
                    value = self._mixed(value)
                else:
                    value = value * self.power()
            else:
                return value

    def _mixed(self, whole: Expr) -> Expr:
        """A number directly behind a factor: `2\\frac{1}{2}`; nothing else is written so."""
        if self.kind == "number" or not whole.is_Integer:
            if self.kind == "number":
                raise Unreadable("two numbers without a sign between them")
            return whole * self.power()
        part = self.power()
        return whole + part if part.is_Rational and 0 < part < 1 else whole * part

    def _divided(self, top: Expr, bottom: Expr) -> Expr:
        if bottom == 0:
            raise Unreadable("division by zero")
        return top / bottom

    def _starts_factor(self) -> bool:
        if self.kind in ("number", "letter"):
            return True
        if self.kind == "sign":
            return self.text in "([{" or (self.text == "|" and not self.bars)
        return self.kind == "command" and self.text not in (
            r"\cdot", r"\times", r"\div", r"\ast", r"\}", r"\rfloor", r"\rceil", r"\rangle", r"\|"
        )  # fmt: skip

    def _is_function(self) -> bool:
        return self.text[1:] in _FUNCTIONS

    def power(self) -> Expr:
        base = self.postfixed(self.atom())
        if not self.take("^"):
            return base
        if self.text == r"\circ":
            self.at += 1
            return base * self.sympy.pi / 180
        self.powers += 1
        if self.powers > MAX_POWERS:
            raise Unreadable("a tower of powers")
        exponent = self.argument()
        if self.text == "^":  # 2^3^2
            self.at += 1
            exponent = self._raised(exponent, self.argument())
        self.powers -= 1
        return self.postfixed(self._raised(base, exponent))

    def postfixed(self, value: Expr) -> Expr:
        while self.text in ("!", "'"):
            if self.take("!"):
                if self.text == "!" or (value.is_number and not 0 <= value <= MAX_FACTORIAL):
                    raise Unreadable("a factorial")
                value = self.sympy.factorial(value)
            else:
                self.at += 1
                value = self.sympy.Symbol(f"{value}'")
        return value

    def _raised(self, base: Expr, exponent: Expr) -> Expr:
        if exponent.is_number and exponent.is_finite is not False:
            size = float(abs(exponent.evalf(15)))
            if size > MAX_EXPONENT:
                raise Unreadable("a huge exponent")
            if base.is_Rational:
                bits = max(int(base.p).bit_length(), int(base.q).bit_length())
                if bits * size > MAX_BITS:
                    raise Unreadable("a huge power")
        if base == 0 and exponent.is_number and exponent <= 0:
            raise Unreadable("a power of zero")
        return base**exponent

    def argument(self) -> Expr:
        """What a command or ^ takes: a group, or one token (`x^10` as people mean it)."""
        if self.text == "{":
            return self.group("{")
        if self.text in ("-", "+"):
            negative = self.text == "-"
            self.at += 1
            value = self.argument()
            return -value if negative else value
        if self.kind == "command" and self._is_function():
            raise Unreadable("a function without its argument")
        return self.atom()

    def digit(self) -> Expr:
        """The argument of \\frac or \\sqrt: without braces, one digit."""
        if self.kind == "number":
            number = self.text
            if not number.isdigit():
                raise Unreadable(number)
            if len(number) > 1:
                self.tokens[self.at] = ("number", number[1:])
            else:
                self.at += 1
            return self.sympy.Integer(number[0])
        return self.argument()

    def group(self, opening: str) -> Expr:
        self.need(opening)
        bars, self.bars = self.bars, 0
        value = self.sum()
        self.bars = bars
        self.need(_CLOSING[opening])
        return value

    # ---- atoms ---------------------------------------------------------------------------------

    def atom(self) -> Expr:
        kind, text = self.kind, self.text
        if kind == "number":
            self.at += 1
            number = numbers.read(text)
            if number is None:
                raise Unreadable(text)
            if self.text == "_":
                raise Unreadable("a base")
            return self.sympy.Rational(number.value.numerator, number.value.denominator)
        if kind == "letter":
            self.at += 1
            return self.symbol(text)
        if text in ("(", "[", "{"):
            return self.group(text)
        if text == "|":
            self.at += 1
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            self.need("|")
            return self.sympy.Abs(value)
        if kind == "command":
            self.at += 1
            return self.command(text[1:])
        raise Unreadable(text or "an end")

    def symbol(self, name: str) -> Expr:
        index = ""
        if self.take("_"):
            index = self.raw()
        elif name == "e":
            return self.sympy.E
        elif name == "i":
            return self.sympy.I
        return self.sympy.Symbol(name + ("_" + index if index else ""))

    def raw(self) -> str:
        """The tokens of a group, or one, as text: an index, what is under a bar."""
        if not self.take("{"):
            self.at += 1
            return self.tokens[self.at - 1][1] if self.at <= len(self.tokens) else ""
        parts = []
        while not self.take("}"):
            if not self.text or self.text == "{":
                raise Unreadable("an index")
            parts.append(self.text)
            self.at += 1
        return "".join(parts)

    def command(self, name: str) -> Expr:
        sympy = self.sympy
        simple: dict[str, Callable[[], Expr]] = {
            "frac": lambda: self._divided(self.digit(), self.digit()),
            "sqrt": self._root,
            "binom": self._binomial,
            "pi": lambda: sympy.pi,
            "infty": lambda: sympy.oo,
            "imath": lambda: sympy.I,
            "lfloor": lambda: sympy.floor(self._until(r"\rfloor")),
            "lceil": lambda: sympy.ceiling(self._until(r"\rceil")),
        }
        if name in simple:
            return simple[name]()
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self.symbol("\\" + name)
        if name in _MARKS:
            return sympy.Symbol(f"{name}({self.raw()})")
        raise Unreadable(name)

    def _until(self, closing: str) -> Expr:
        value = self.sum()
        self.need(closing)
        return value

    def _root(self) -> Expr:
        degree = self.group("[") if self.text == "[" else self.sympy.Integer(2)
        return self._raised(self._radicand(), self._divided(self.sympy.Integer(1), degree))

    def _radicand(self) -> Expr:
        if self.text == "(":
            return self.group("(")
        if self.kind == "number":  # \sqrt12 is read as people write it: the whole number
            return self.atom()
        return self.digit()

    def _binomial(self) -> Expr:
        top, bottom = self.digit(), self.digit()
        if any(part.is_number and not abs(part) <= MAX_EXPONENT for part in (top, bottom)):
            raise Unreadable("a huge binomial coefficient")
        return self.sympy.binomial(top, bottom)

    def _function(self, name: str) -> Expr:
        sympy = self.sympy
        exponent: Expr | None = None
        base: Expr | None = None
        if name == "log" and self.take("_"):
            base = self.argument()
        if self.take("^"):
            exponent = self.argument()
            if exponent == -1 and name in _INVERSE:
                name, exponent = _INVERSE[name], None
        bracketed = self.text in ("(", "[", "{")
        value = self.group(self.text) if bracketed else self.product(of_function=True)
        if name in ("gcd", "lcm", "min", "max"):
            raise Unreadable(name)
        if name == "exp":
            result = self._raised(sympy.E, value)
        elif name == "lg":
            result = sympy.log(value, 10)
        elif base is not None:
            result = sympy.log(value, base)
        else:
            result = getattr(sympy, _FUNCTIONS[name])(value)
        return result if exponent is None else self._raised(result, exponent)


# ---- compare -----------------------------------------------------------------------------------

_DIGITS = 60
_POINTS = (
    (Fraction(7, 10), Fraction(11, 9), Fraction(5, 13), Fraction(17, 12), Fraction(3, 7)),
    (Fraction(31, 17), Fraction(8, 11), Fraction(23, 15), Fraction(2, 9), Fraction(19, 14)),
    (Fraction(-9, 13), Fraction(6, 5), Fraction(-14, 11), Fraction(10, 19), Fraction(-3, 8)),
    (Fraction(4, 9), Fraction(-12, 7), Fraction(15, 16), Fraction(-5, 3), Fraction(13, 10)),
)


def same(reference: Expr, found: Expr) -> bool:
    """Whether two exact expressions are one: by form, else by value to 50 digits at four points.

    Values decide and not `simplify`: it can take minutes, and leaves equal forms unequal.
    """
    if reference == found:
        return True
    names = sorted(reference.free_symbols | found.free_symbols, key=str)
    if reference.free_symbols != found.free_symbols and (not names or len(names) > 12):
        return False
    if not names and reference.is_Rational and found.is_Rational:
        return False
    compared = 0
    for point in _POINTS if names else ((),):
        values = {
            name: _rational(point[index % len(point)] + index // len(point))
            for index, name in enumerate(names)
        }
        pair = [value_at(expr, values) for expr in (reference, found)]
        if pair[0] is None or pair[1] is None:
            continue
        if not _close(pair[0], pair[1]):
            return False
        compared += 1
    return compared >= (2 if names else 1)


def ratio(reference: Expr, found: Expr) -> Expr | None:
    """The number c with reference = c * found at all points; None if there is none, or it is 0."""
    names = sorted(reference.free_symbols | found.free_symbols, key=str)
    if reference.free_symbols != found.free_symbols or not names:
        return None
    first: Expr | None = None
    for point in _POINTS:
        values = {
            name: _rational(point[index % len(point)] + index // len(point))
            for index, name in enumerate(names)
        }
        top, bottom = value_at(reference, values), value_at(found, values)
        if top is None or bottom is None or bottom == 0 or top == 0:
            return None
        if first is None:
            first = top / bottom
        elif not _close(first, top / bottom):
            return None
    return first


def value_at(expr: Expr, values: dict[Expr, Expr]) -> Expr | None:
    """The value to 60 digits, complex ones too; None where it has none."""
    value = expr.evalf(_DIGITS, subs=values) if values else expr.evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.free_symbols else None


def _close(one: Expr, other: Expr) -> bool:
    scale = max(abs(one), abs(other))
    return bool(abs(one - other) <= scale * 10 ** (10 - _DIGITS))


def _rational(value: Fraction) -> Expr:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)
