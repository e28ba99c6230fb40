"""Whether two expressions have the same values, to 50 digits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Expr

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
        values = _values(names, point)
        pair = [value_at(expr, values) for expr in (reference, found)]
        if pair[0] is None or pair[1] is None:
            continue
        if not _close(pair[0], pair[1]):
            return False
        compared += 1
    return compared >= (2 if names else 1)


def with_constant_of(reference: Expr, found: Expr) -> Expr:
    """`x^3 + c` as `x^3 + C`, where that is the reference's constant of integration."""
    import sympy

    ours, theirs = sympy.Symbol("c"), sympy.Symbol("C")
    one, other = reference.free_symbols, found.free_symbols
    if one == {theirs} or one - other != {theirs} or other - one != {ours}:
        return found
    return found.subs(ours, theirs) if reference.diff(theirs) == 1 == found.diff(ours) else found


def ratio(reference: Expr, found: Expr) -> Expr | None:
    """The number c with reference = c * found at all points; None if there is none, or it is 0."""
    names = sorted(reference.free_symbols | found.free_symbols, key=str)
    if reference.free_symbols != found.free_symbols or not names:
        return None
    first: Expr | None = None
    for point in _POINTS:
        values = _values(names, point)
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


def _values(names: Sequence[Expr], point: Sequence[Fraction]) -> dict[Expr, Expr]:
    """A value for each name, all different."""
    return {
        name: _rational(point[index % len(point)] + index // len(point))
        for index, name in enumerate(names)
    }


def _close(one: Expr, other: Expr) -> bool:
    scale = max(abs(one), abs(other))
    return bool(abs(one - other) <= scale * 10 ** (10 - _DIGITS))


def _rational(value: Fraction) -> Expr:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)
