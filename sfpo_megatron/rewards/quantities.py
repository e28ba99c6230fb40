r"""A number or an expression with what stands behind it: a unit, percent, `million`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from sfpo_megatron.rewards import numbers
from sfpo_megatron.rewards.expressions import Unreadable, expression
from sfpo_megatron.rewards.numbers import Written
from sfpo_megatron.rewards.splitting import split
from sfpo_megatron.rewards.units import scale_of, unit_of, without_braces

if TYPE_CHECKING:
    from sympy import Expr

MAX_QUANTITY_CHARS = 300

GROUPED = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2})((?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_QUANTITY = re.compile(
    r"(?P<value>.*?(?:[0-9)}\]!.]|\\pi(?![A-Za-z])))(?P<space>\s*)"
    r"(?P<unit>(?!\\pi(?![A-Za-z]))\\?[^\W\d_][^0-9{}()]*(?:\^\{?\s*-?[0-9]\s*\}?)?(?:\s*(?:/|\\cdot)\s*[A-Za-z]+(?:\^\{?-?[0-9]\}?)?)*)"
)
_DEGREES = re.compile(r"(.*?)\s*\^\\circ\s*(C|F|K|[Cc]elsius|[Ff]ahrenheit)?")
_CURRENCY = re.compile(
    r"(-?)\s*(?:USD?\s*(?=\\dollar))?"
    r"(\\(?:dollar|euro|pound|yen|rupee|won|ruble)|(?:USD|EUR|GBP|JPY|INR|Rs\.?)(?=\s*[-0-9.]))"
    r"\s*(-?)(.*)"
)
_MARKED = re.compile(r"(.*[0-9}])\s*('|''|\")")
"""Feet and inches: `6'`, `12"`."""
_MODULO = re.compile(r"(.*?)\s*\(?\s*\\mod\s*\{?\s*([0-9]+)\s*\}?\s*\)?")
_HEAVY = re.compile(r"\\(?:sum|int|prod|lim)(?![A-Za-z])")


@dataclass(kw_only=True, frozen=True, slots=True)
class Value:
    """A number or an expression, with what stands behind it."""

    exact: Fraction | Expr
    written: Written | None = None
    unit: str = ""
    percent: bool = False
    letters: str = field(default="", compare=False)
    """A product of variables as it is written, which may be a word."""


def quantity(text: str) -> Value | None:
    """A number and its unit, sign of currency, percent or degrees."""
    if text.endswith("%"):
        value = value_of(text[:-1].rstrip())
        return value and Value(exact=value.exact, written=value.written, percent=True)
    if degrees := _DEGREES.fullmatch(text):
        return _with_unit(degrees[1], "degree" + (degrees[2] or "")[:1].upper())
    if currency := _CURRENCY.fullmatch(text):
        rest = re.sub(r"\s+(?:dollars|USD|euros?|pounds?)$", "", currency[4])
        return _of_currency(currency[1] + currency[3] + rest, unit_of(currency[2], spaced=True))
    if marked := _MARKED.fullmatch(text):
        return _with_unit(marked[1], "foot" if marked[2] == "'" else "inch")
    if modulo := _MODULO.fullmatch(text):
        return _modulo(modulo[1], int(modulo[2]))
    short = len(text) <= MAX_QUANTITY_CHARS
    found = _QUANTITY.fullmatch(without_braces(text)) if short else None
    if found is None:
        return None
    factor, phrase = scale_of(found["unit"].strip())
    if factor != 1 and not phrase:
        return _with_unit(found["value"], "", factor)
    name = unit_of(phrase, spaced=bool(found["space"]))
    if name and r"\frac" in found["value"] and not re.search("[aeiouy]", name):
        return None  # `\\frac{1}{2} mgh` is a product
    return _with_unit(found["value"], name, factor) if name else None


def _modulo(text: str, modulus: int) -> Value | None:
    """`10 \\pmod 7` is 3, with the modulus for its unit."""
    value = value_of(text)
    if value is None or not isinstance(value.exact, Fraction) or not modulus:
        return None
    if value.exact.denominator != 1:
        return None
    return Value(exact=value.exact % modulus, unit=f"mod {modulus}")


def _of_currency(amount: str, unit: str | None) -> Value | None:
    """An amount, which may be in millions, or one per month."""
    if unit is None:
        return None
    if value := _with_unit(amount, unit):
        return value
    found = quantity(amount)
    if found is None or found.percent:
        return None
    return replace(found, unit=f"{unit}*{found.unit}" if found.unit else unit)


def _with_unit(text: str, unit: str, factor: int = 1) -> Value | None:
    """The value in units, `factor` times what is written."""
    value = value_of(GROUPED.sub(lambda number: number.group().replace(",", ""), text.strip()))
    if value is None or (not isinstance(value.exact, Fraction) and value.exact.free_symbols):
        return None
    if len(split(text.strip().lstrip("+-"), re.compile("[-+]"))[0]) > 1:
        return None  # `1 + 2 m` is a sum, not three metres
    written = value.written and Written(value.written.unit * factor, value.written.significant)
    percent = unit == "percent"
    return Value(
        exact=value.exact * factor,
        written=written,
        unit="" if percent else unit,
        percent=percent,
    )


def value_of(text: str) -> Value | None:
    """The number or expression that the whole of `text` is; None if it is none."""
    if number := numbers.read(text):
        return Value(exact=number.value, written=number.written)
    if _HEAVY.search(text):
        return _with_operators(text)
    try:
        found = expression(text)
    except Unreadable:
        return None
    letters = text.replace(" ", "")
    if not letters.isalpha():
        letters = ""
    if found.is_Rational:  # of letters too: `ii`
        found = Fraction(int(found.p), int(found.q))
    return Value(exact=found, written=_digits(text), letters=letters)


def _with_operators(text: str) -> Value | None:
    """Sums, products, integrals, limits: as latex2sympy reads them, evaluated by sympy."""
    from latex2sympy2_extended import latex2sympy
    from sympy import Expr

    try:
        found = latex2sympy(text, normalization_config=None).doit()
    except Exception:  # whatever its grammar, or sympy, raises on a model's text
        return None
    return Value(exact=found) if isinstance(found, Expr) else None


def _digits(text: str) -> Written | None:
    """The precision of the least exact decimal in an expression."""
    found = re.findall(r"[0-9]*\.[0-9]+", text)
    if not found:
        return None
    return Written(Fraction(0), min(len(one.replace(".", "").lstrip("0")) for one in found))
