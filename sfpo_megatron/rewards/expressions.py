r"""Reads one expression in LaTeX or plain notation into sympy, evaluated, with limits on its size.

A descent parser: `sum = product (+- product)*`, `product = power (* / or nothing, power)*`. It
refuses what it does not know in full, so nothing is dropped on the way, and what would be huge:
powers above MAX_BITS, factorials above MAX_FACTORIAL. Nothing of the text is ever run as program
code. A number behind a factor without a sign between them (`7 8`, `x2`) is no expression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfpo_megatron.rewards.atoms import Atoms
from sfpo_megatron.rewards.hostile import MAX_FACTORIAL
from sfpo_megatron.rewards.tokens import Unreadable

if TYPE_CHECKING:
    from sympy import Expr

__all__ = ["Unreadable", "expression"]

MAX_POWERS = 4


def expression(text: str, *, words: bool = True) -> Expr:
    """The expression that the whole of `text` is; Unreadable if it is none, or if a run of letters
    may be a word and not a product (without `words` none may)."""
    try:
        return _Parser(text, words=words).whole()
    except (RecursionError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise Unreadable(type(error).__name__) from error
    except (TypeError, AttributeError, ValueError) as error:  # of sympy, about an odd argument
        raise Unreadable(str(error)) from error


class _Parser(Atoms):
    def whole(self) -> Expr:
        value = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(self.text)
        return value

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
                value = self.divided(value, self.power())
            elif self.starts_factor() and not (of_function and self.is_function()):
                if self.tokens[self.at - 1][1] == "!":  # 3!7! is a product
                    value = value * self.power()
                elif self.kind == "number" or (value.is_number and self._is_fraction()):
                    value = self._mixed(value)
                else:
                    value = value * self.power()
            else:
                return value

    def _is_fraction(self) -> bool:
        """Whether a fraction is next, also in braces, which no one sees."""
        behind = [text for _, text in self.tokens[self.at : self.at + 2]]
        return behind[:1] == [r"\frac"] or behind == ["{", r"\frac"]

    def _mixed(self, whole: Expr) -> Expr:
        """A number directly behind a factor: `2\\frac{1}{2}`; nothing else is written so."""
        if self.kind == "number" or not whole.is_Integer:
            if self.kind == "number":
                raise Unreadable("two numbers without a sign between them")
            return whole * self.power()
        part = self.power()
        return whole + part if part.is_Rational and 0 < part < 1 else whole * part

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
            exponent = self.raised(exponent, self.argument())
        self.powers -= 1
        return self.postfixed(self.raised(base, exponent))

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
