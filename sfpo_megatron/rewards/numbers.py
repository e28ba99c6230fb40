r"""Numbers as people write them, read exactly: a fraction, and how far its digits go.

Integers, decimals (`.5`, `1.6e-19`, `1.6 \times 10^{-19}`, `0.1\overline{6}`), fractions, mixed
numbers (`2\frac{1}{2}`, `2 1/2`), bases (`2516_8`). A decimal with an end is a rounded value:
`agree` says what it may stand for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sfpo_megatron.rewards.hostile import MAX_DIGITS


class Written(NamedTuple):
    """The digits of a decimal."""

    unit: Fraction
    """Worth of one in its last place."""
    significant: int


@dataclass(kw_only=True, frozen=True, slots=True)
class Number:
    """An exact value; `written`: that of a decimal, None for one without rounding."""

    value: Fraction
    written: Written | None = None


_MAX_CHARS = 4 * MAX_DIGITS  # of `1,000,000`, whose digits stand apart; Python reads 4300 digits
_POWER = r"\s*(?:[eE]|(?:\\times|\\cdot|\*|x)\s*10\s*\^)\s*\{?\s*([-+]?[0-9]{1,4})\s*\}?"
_DECIMAL = re.compile(rf"([-+]?)\s*([0-9]*)(\.?)([0-9]*)(?:{_POWER})?")
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]+)?")
_FRACTION = re.compile(
    r"([-+]?)\s*(?:([0-9]+)\s*(?:\s|(?=\\)))??\s*"
    r"(?:\\frac\s*(?:\{\s*([-+]?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([-+]?[0-9]+)\s*\}|([0-9]))|([0-9]+)\s*/\s*([0-9]+))"
)
_REPEATING = re.compile(
    r"([-+]?)([0-9]*)\.([0-9]*)"
    r"(?:\\(?:overline|bar|dot)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))|\(([0-9]+)\))(?:\s*\\ldots)?"
)
_DOTS = re.compile(r"([-+]?)([0-9]*)\.([0-9]*?)(?:([0-9])\4{2,}|([0-9]{2,}?)\5+)\s*\\ldots")
_BASED = re.compile(
    r"([-+]?)(?:\(([0-9A-Fa-f]+)\)|([0-9A-Fa-f]+))_"
    r"\s*\{?\s*(?:\\?[a-z]*\s*\{)?\s*\(?([0-9]{1,2}|[a-z]+)\)?\s*\}*"
)
_BASE_NAMES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(),  # noqa: SIM905
        start=2,
    )
} | {"sixteen": 16}


def read(text: str) -> Number | None:
    """The number that the whole of `text` is; None if it is none, or huge."""
    if len(text) > _MAX_CHARS:
        return None
    found = _DECIMAL.fullmatch(text)
    if found and (found[2] or found[4]):
        return _decimal(*found.groups())
    if _GROUPED.fullmatch(text):
        return read(text.replace(",", "").replace(" ", ""))
    if found := _FRACTION.fullmatch(text):
        return _fraction(*found.groups())
    if found := _REPEATING.fullmatch(text):
        sign, whole, fixed, *period = found.groups()
        return _repeating(sign, whole, fixed, "".join(digits or "" for digits in period))
    if found := _DOTS.fullmatch(text):
        sign, whole, fixed, *period = found.groups()
        return _repeating(sign, whole, fixed, period[0] or period[1])
    if found := _BASED.fullmatch(text):
        return _based(found[1], found[2] or found[3], found[4])
    return None


def _decimal(sign: str, whole: str, point: str, part: str, power: str | None) -> Number:
    digits = whole + part
    places = int(power or 0) - len(part)
    value = int(digits) * Fraction(10) ** places * (-1 if sign == "-" else 1)
    if not point and places >= 0:
        return Number(value=value)
    significant = len(digits.lstrip("0"))
    return Number(value=value, written=Written(Fraction(10) ** places, significant))


def _fraction(sign: str, whole: str | None, *parts: str | None) -> Number | None:
    top, bottom = [int(part) for part in parts if part]
    if bottom == 0 or (whole is not None and not 0 < top < bottom):
        return None
    value = Fraction(top, bottom) + int(whole or 0)
    return Number(value=-value if sign == "-" else value)


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Number:
    shift = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), shift) + Fraction(
        int(period), shift * (10 ** len(period) - 1)
    )
    return Number(value=-value if sign == "-" else value)


def _based(sign: str, digits: str, base: str) -> Number | None:
    number = int(base) if base.isdigit() else _BASE_NAMES.get(base, 0)
    if not 2 <= number <= 36:
        return None
    try:
        value = int(digits, number)
    except ValueError:
        return None
    return Number(value=Fraction(-value if sign == "-" else value))


# ---- compare -----------------------------------------------------------------------------------

ENOUGH_DIGITS = 6
"""Significant digits from which a decimal stands for what it rounds (0.333333 for 1/3)."""
ENOUGH_IN_REFERENCE = 3
"""The same for a reference that an exact response is rounded to (3.14 for pi)."""
_NOISE = Fraction(1, 10**12)  # floating point: 0.30000000000000004
_NOISE_DIGITS = 14


def agree(reference: Number, found: Number) -> bool:
    """Whether they are one number: exactly, or as far as the digits of a decimal go."""
    if reference.value == found.value:
        return True
    theirs, ours = reference.written, found.written
    if reference.value == 0 or found.value == 0 or (theirs is None and ours is None):
        return False
    if max(w.significant for w in (theirs, ours) if w is not None) >= _NOISE_DIGITS and (
        abs(reference.value - found.value) <= _NOISE * abs(reference.value)
    ):
        return True
    if ours is None:
        assert theirs is not None
        return theirs.significant >= ENOUGH_IN_REFERENCE and rounds(found.value, reference)
    if theirs is None:
        return ours.significant >= ENOUGH_DIGITS and rounds(reference.value, found)
    # Two decimals, one with more digits: both must have enough, behind the point too.
    longer, shorter = sorted((reference, found), key=_unit)
    written = shorter.written
    assert written is not None
    few = written.significant < ENOUGH_DIGITS or written.unit > Fraction(1, 10**4)
    return not few and rounds(longer.value, shorter)


def _unit(number: Number) -> Fraction:
    return number.written.unit if number.written else Fraction(0)


def rounds(exact: Fraction, decimal: Number) -> bool:
    """Whether `exact` gives `decimal` when it is rounded; cut off too, with enough digits."""
    assert decimal.written is not None
    unit, significant = decimal.written
    off = exact - decimal.value
    if abs(off) * 2 <= unit:
        return True
    return significant >= ENOUGH_DIGITS and 0 <= (off if exact > 0 else -off) < unit
