"""Values and how far they are rounded: two that are one, an exact one beside its decimal."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from sfpo_megatron.rewards import numbers, values
from sfpo_megatron.rewards.answer_kinds import Answer, Named
from sfpo_megatron.rewards.numbers import ENOUGH_DIGITS, Number, Written
from sfpo_megatron.rewards.quantities import Value

if TYPE_CHECKING:
    from sympy import Expr


def rounds_to(exact: Value, decimal: Value) -> bool:
    """Whether `exact`, which is no decimal, gives `decimal` when it is rounded."""
    value, written = fraction(as_sympy(hundredth(exact))), _written(decimal)
    if _is_decimal(exact) or value is None or written is None:
        return False
    if exact.unit and decimal.unit and exact.unit != decimal.unit:
        return False
    hundred = 100 if decimal.percent else 1
    unit = Written(written.unit / hundred, written.significant)
    rounded = hundredth(decimal)
    return isinstance(rounded, Fraction) and numbers.rounds(
        value, Number(value=rounded, written=unit)
    )


def _written(decimal: Value) -> Written | None:
    """The digits of a decimal; a whole number of two digits or more can be one too."""
    exact = decimal.exact
    if decimal.written is not None or not isinstance(exact, Fraction):
        return decimal.written
    if exact.denominator != 1 or abs(exact) < 10:
        return None
    return Written(Fraction(1), len(str(abs(exact.numerator))))


def _is_decimal(side: Value) -> bool:
    return side.written is not None and isinstance(side.exact, Fraction)


def near(one: Answer, other: Answer) -> bool:
    """Sides of an approximation: within a percent, and at least one of them a decimal."""
    if isinstance(one, Named):
        one = one.value
    if not (isinstance(one, Value) and isinstance(other, Value)):
        return False
    decimals = [fraction(as_sympy(side.exact)) for side in (one, other)]
    if decimals[0] is None or decimals[1] is None or not (one.written or other.written):
        return False
    return abs(decimals[0] - decimals[1]) * 100 <= abs(decimals[0])


def same_quantity(reference: Value, found: Value) -> bool:
    """Whether they are one number or expression; a unit may be missing on one side."""
    if reference.unit and found.unit and reference.unit != found.unit:
        return False
    if reference.percent == found.percent:
        return _same_value(reference.exact, reference.written, found.exact, found.written)
    if (reference.unit and found.percent) or (found.unit and reference.percent):
        return False
    # `50\%` is 0.5, and 50 where the question asks for percent.
    return any(
        _same_value(r, reference.written, f, found.written)
        for r, f in (
            (reference.exact, found.exact),
            (hundredth(reference), hundredth(found)),
        )
    )


def _same_value(
    reference: Fraction | Expr,
    theirs: Written | None,
    found: Fraction | Expr,
    ours: Written | None,
) -> bool:
    if isinstance(reference, Fraction) and isinstance(found, Fraction):
        return numbers.agree(
            Number(value=reference, written=theirs), Number(value=found, written=ours)
        )
    one, other = as_sympy(reference), as_sympy(found)
    if values.same(one, values.with_constant_of(one, other)):
        return True
    if (theirs is None and ours is None) or one.free_symbols or other.free_symbols:
        return False
    decimals = [fraction(expr) for expr in (one, other)]
    if decimals[0] is None or decimals[1] is None:
        return False
    return numbers.agree(
        Number(value=decimals[0], written=_of_decimal(reference, theirs, decimals[0])),
        Number(value=decimals[1], written=_of_decimal(found, ours, decimals[1])),
    )


def _of_decimal(exact: Fraction | Expr, written: Written | None, value: Fraction) -> Written | None:
    """The digits of a decimal; those that an expression of decimals (`1.41421\\pi`) can have."""
    if written is None or isinstance(exact, Fraction):
        return written
    if written.significant < ENOUGH_DIGITS:
        return Written(Fraction(0), written.significant)
    return Written(abs(value) / 10 ** (written.significant - 1), written.significant)


def hundredth(value: Value) -> Fraction | Expr:
    """Its value, of percents a hundredth."""
    return value.exact / 100 if value.percent else value.exact


def fraction(expr: Expr) -> Fraction | None:
    """The real number that an expression is, to many digits; None if it is none."""
    value = values.value_at(expr, {})
    if value is None or not value.is_real:
        return None
    import sympy

    exact = sympy.Rational(str(value))
    return Fraction(int(exact.p), int(exact.q))


def as_sympy(exact: Fraction | Expr) -> Expr:
    """A fraction as sympy has it."""
    if not isinstance(exact, Fraction):
        return exact
    import sympy

    return sympy.Rational(exact.numerator, exact.denominator)
