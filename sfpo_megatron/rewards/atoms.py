r"""Numbers, variables, brackets and commands such as \frac, with limits on their size."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from sfpo_megatron.rewards import numbers
from sfpo_megatron.rewards.hostile import MAX_EXPONENT
from sfpo_megatron.rewards.tokens import FUNCTIONS, Tokens, Unreadable

if TYPE_CHECKING:
    from sympy import Expr

MAX_BITS = 40_000
"""Sum of the lengths of all powers of numbers in an expression."""

_GREEK = set(
    re.findall(
        r"\w+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
        "xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma "
        "Phi Psi Omega ell hbar",
    )
)
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
_MARKS = {"overline", "bar", "hat", "vec", "tilde", "overrightarrow", "widehat"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class Atoms(Tokens, ABC):
    """The parts of an expression that hold together without signs."""

    @abstractmethod
    def sum(self) -> Expr:
        """Terms with + and - between them."""

    @abstractmethod
    def product(self, *, of_function: bool = False) -> Expr:
        """Factors; `of_function`: those that a function without brackets takes."""

    def argument(self) -> Expr:
        """What a command or ^ takes: a group, or one token (`x^10` as people mean it)."""
        if self.text == "{":
            return self.group("{")
        if self.text in ("-", "+"):
            negative = self.text == "-"
            self.at += 1
            value = self.argument()
            return -value if negative else value
        if self.kind == "command" and self.is_function():
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
        """A sum in brackets."""
        self.need(opening)
        bars, self.bars = self.bars, 0
        value = self.sum()
        self.bars = bars
        self.need(_CLOSING[opening])
        return value

    def atom(self) -> Expr:
        """A number, a variable, a bracket or a command with its arguments."""
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
        """A variable with its index; e and i are the numbers."""
        index = ""
        if self.take("_"):
            index = self.raw()
        elif name == "e":
            return self.sympy.E
        elif name == "i":
            return self.sympy.I
        return self.sympy.Symbol(name + ("_" + index if index else ""))

    def command(self, name: str) -> Expr:
        """What a command stands for, its name already taken."""
        sympy = self.sympy
        simple: dict[str, Callable[[], Expr]] = {
            "frac": lambda: self.divided(self.digit(), self.digit()),
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
        if name in FUNCTIONS:
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
        return self.raised(self._radicand(), self.divided(self.sympy.Integer(1), degree))

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
        if name in ("gcd", "lcm", "min", "max"):
            raise Unreadable(name)  # `\\max(71, 72)` has two candidates
        bracketed = self.text in ("(", "[", "{")
        value = self.group(self.text) if bracketed else self.product(of_function=True)
        if name in ("exp", "cis"):
            result = self.raised(sympy.E, value * sympy.I if name == "cis" else value)
        elif name == "lg":
            result = sympy.log(value, 10)
        elif base is not None:
            result = sympy.log(value, base)
        else:
            result = getattr(sympy, FUNCTIONS[name])(value)
        return result if exponent is None else self.raised(result, exponent)

    def divided(self, top: Expr, bottom: Expr) -> Expr:
        """A quotient; Unreadable by zero."""
        if bottom == 0:
            raise Unreadable("division by zero")
        return top / bottom

    def raised(self, base: Expr, exponent: Expr) -> Expr:
        """A power; Unreadable if it is huge."""
        if exponent.is_number and exponent.is_finite is not False:
            size = float(abs(exponent.evalf(15)))
            if size > MAX_EXPONENT:
                raise Unreadable("a huge exponent")
            if base.is_Rational:
                bits = max(int(base.p).bit_length(), int(base.q).bit_length())
                self.bits += bits * size
                if self.bits > MAX_BITS:
                    raise Unreadable("a huge power")
        if base == 0 and exponent.is_number and exponent <= 0:
            raise Unreadable("a power of zero")
        return base**exponent
