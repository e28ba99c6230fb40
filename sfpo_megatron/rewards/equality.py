"""Whether two readings of answers are the same: the reference decides what the response must be.

Exact values are compared exactly, decimals as far as their digits go (`numbers.agree`), lists
without order, tuples and intervals with it. A chain of sides (`71 = 72`) is right if every side is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from sfpo_megatron.rewards import values
from sfpo_megatron.rewards.answer_kinds import Answer, Chain, Choice, Group, Matrix, Named, Text
from sfpo_megatron.rewards.answers import FLIPPED, readings
from sfpo_megatron.rewards.expressions import Unreadable, expression
from sfpo_megatron.rewards.quantities import Value, value_of
from sfpo_megatron.rewards.real_sets import same_set
from sfpo_megatron.rewards.rounding import as_sympy, near, rounds_to, same_quantity

if TYPE_CHECKING:
    from sympy import Expr


_FUNCTION = re.compile(r"([A-Za-z]\w*)\(([A-Za-z])\)")
"""A function's name and its variable."""
_CALLED = re.compile(
    r"(?=.*[A-Za-z])(?!.*\b(?:l?not|neg|no|wait|is|or|and)\b)"
    r"[A-Za-z]*(?:\\[A-Za-z]+ ?)?[A-Za-z ]*(?:\([^()]*\)|\[[^][]*\])?"
)
"""`P(A\\cap B)`, `[ABC]`, `m\\angle BAC`, `\\det A`: what a value is said to be the value of."""
_SUM = re.compile(r"({0}\+)+\\ldots(\+{0})+".format(r"[A-Za-z](?:_(?:\w+|\{\w+\}))?(?:\^\w)?"))
"""`a_1 + ... + a_n`"""
_LONG_RUN = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{5}| [A-Za-z]{2,} ")
"""Words."""
_LONGEST_PRODUCT = 5
_ROMAN = re.compile("[IVXLCDM]{3,}", re.IGNORECASE)
_LEFT_OUT = {"", "{}", "()", "[]"}
"""Brackets that may be missing; those of `[2, 5)` say what no comma does, nor a colon."""
_BETWEEN_STATEMENTS = {r"\implies", r"\iff", r"\in"}
"""Signs whose sides are no terms of an equation, to be moved across."""


def equal(reference: Answer, found: Answer) -> bool:
    """Whether `found` is what `reference` asks for."""
    if isinstance(reference, Named) and isinstance(found, Named):
        if reference.name == found.name and equal(reference.value, found.value):
            return True
        if reference.name == found.name:  # `P = IV` is a formula, `x = IV` the number 4
            is_formula = reference.name.isupper() and {reference.sign, found.sign} == {"="}
            return is_formula and _same_product(reference, found)
        if renamed := _of_one_variable(reference, found):
            return equal(reference.value, renamed)
        return _relations(_as_chain(reference), _as_chain(found))  # `a < b`, `b > a`
    if isinstance(reference, Choice) or isinstance(found, Choice):
        return _choices(reference, found)
    if isinstance(reference, Chain) and isinstance(found, Named):
        return _relations(reference, _as_chain(found)) or equal(reference, found.value)
    if isinstance(reference, Named) and isinstance(found, Chain):
        return _relations(_as_chain(reference), found) or equal(reference.value, found)
    if isinstance(found, Named):
        return equal(reference, found.value)
    if isinstance(reference, Named):
        return equal(reference.value, found)
    if isinstance(reference, Chain) or isinstance(found, Chain):
        return _chains(reference, found)
    groups = [one for one in (reference, found) if isinstance(one, Group)]
    if groups and not isinstance(reference, Matrix) and not isinstance(found, Matrix):
        return _groups(reference, found)
    if isinstance(reference, Matrix) != isinstance(found, Matrix):
        reference, found = _as_matrix(reference), _as_matrix(found)
    if isinstance(reference, Matrix) and isinstance(found, Matrix):
        return len(reference.rows) == len(found.rows) and all(
            _in_order(one, other) for one, other in zip(reference.rows, found.rows, strict=True)
        )
    if isinstance(reference, Value) and isinstance(found, Value):
        return same_quantity(reference, found)
    return (isinstance(reference, Text) and reference == found) or _same_formula(reference, found)


def _same_formula(reference: Answer, found: Answer) -> bool:
    """`2axy` and `2xya`: a run of letters that may be a word is a product beside other signs. One
    that is set as a word is none: `\\text{NE}` is `NE`, and not `EN`."""
    for word, product in ((reference, found), (found, reference)):
        if isinstance(word, Text) and word.is_set and isinstance(product, Value):
            return word.cased == product.letters
    if isinstance(reference, Text) and isinstance(found, Text) and reference.words.isalpha():
        return False  # `eat` and `tea`
    one, other = _formula(reference), _formula(found)
    if one is None or other is None or one.free_symbols != other.free_symbols:
        return False
    return values.same(one, other)


def _formula(answer: Answer) -> Expr | None:
    """An expression with variables, all letters of a text for such."""
    if isinstance(answer, Text) and not _LONG_RUN.search(answer.words):
        try:
            expr = expression(answer.cased, words=False)
        except Unreadable:
            return None
    elif isinstance(answer, Value) and not answer.unit and not answer.percent:
        expr = as_sympy(answer.exact)
    else:
        return None
    return expr if expr.free_symbols else None


def _same_product(reference: Named, found: Named) -> bool:
    """`F = BIL` and `F = ILB`: three letters and more are read as a word."""
    one, other = reference.value, found.value
    if isinstance(one, Text) and isinstance(other, Text) and len(one.words) <= _LONGEST_PRODUCT:
        if one.is_set:
            return False
        if _ROMAN.fullmatch(one.words) and _ROMAN.fullmatch(other.words):
            return False
        return one.words.isalpha() and sorted(one.cased) == sorted(other.cased)
    return _relations(_as_chain(reference), _as_chain(found))


def _of_one_variable(reference: Named, found: Named) -> Answer | None:
    """What `f(t) = t^2` is for the variable of `f(x) = x^2`; None if they are not of one form."""
    one, other = _FUNCTION.fullmatch(reference.name), _FUNCTION.fullmatch(found.name)
    if one is None or other is None or one[1] != other[1] or not isinstance(found.value, Value):
        return None
    import sympy

    exact = as_sympy(found.value.exact)
    if sympy.Symbol(one[2]) in exact.free_symbols:
        return None
    exact = exact.subs(sympy.Symbol(other[2]), sympy.Symbol(one[2]))
    return replace(found.value, exact=exact, letters="")


def _as_matrix(answer: Answer) -> Answer:
    """A vector as a column, `[[1, 2], [3, 4]]` as its rows; others as they are."""
    if not isinstance(answer, Group) or not answer.opening:
        return answer
    rows = [one.items for one in answer.items if isinstance(one, Group) and one.opening == "["]
    if answer.opening == "[" and len(rows) == len(answer.items):
        return Matrix(rows=tuple(rows))
    if answer.opening + answer.closing == "()":
        return Matrix(rows=tuple((one,) for one in answer.items))
    return answer


def _choices(reference: Answer, found: Answer) -> bool:
    if isinstance(reference, Choice) and isinstance(found, Choice):
        if reference.letter != found.letter:
            return False
        if not reference.text or not found.text:
            return True
        return any(equal(r, f) for r in readings(reference.text) for f in readings(found.text))
    if isinstance(reference, Choice) and reference.text:  # the option's text, without its letter
        return any(equal(one, found) for one in readings(reference.text))
    return False


def _chains(reference: Answer, found: Answer) -> bool:
    if isinstance(reference, Chain) and isinstance(found, Chain):
        return _relations(reference, found)
    if isinstance(found, Chain):
        if r"\equiv" in found.signs:
            return _is_congruence(found) and equal(reference, found.sides[-1])
        if any(sign not in ("=", r"\implies", r"\iff", r"\approx") for sign in found.signs):
            return False
        if r"\approx" in found.signs:
            return _is_rounding(found) and any(equal(reference, side) for side in found.sides)
        if solution := _solution(found):
            return equal(reference, solution)
        sides = found.sides
        is_called = (
            {*found.signs} == {"="} and _is_called(sides[0]) and isinstance(reference, Value)
        )
        if (_is_unknown(sides[0]) or is_called) and not _is_unknown(reference):
            sides = sides[1:]  # `m + n = 204` says what 204 is
        return all(equal(reference, side) for side in sides)
    assert isinstance(reference, Chain)
    if set(reference.signs) == {r"\approx"} and _all_near(reference):
        return any(equal(side, found) for side in reference.sides)  # either form is the answer
    is_equality = all(sign == "=" for sign in reference.signs)
    sides = reference.sides[_is_called(reference.sides[0]) :]
    return is_equality and all(equal(side, found) for side in sides)


def _is_congruence(found: Chain) -> bool:
    """`2^{10} \\equiv 2 \\pmod 7`, whose sides leave one remainder."""
    sides = [side for side in found.sides if isinstance(side, Value)]
    if len(sides) < len(found.sides):
        return False
    *others, last = sides
    modulus = int(last.unit.removeprefix("mod ")) if last.unit.startswith("mod ") else 0
    return modulus > 0 and all(
        isinstance(one.exact, Fraction) and (one.exact - last.exact) % modulus == 0
        for one in others
    )


def _solution(found: Chain) -> Answer | None:
    """What x is in `2x = 4 \\implies x = 2`, if it fulfils what stands before; None for others."""
    within, between = {*found.signs[::2]}, {*found.signs[1::2]}
    if len(found.sides) % 2 or within != {"="} or not between or between - {r"\implies", r"\iff"}:
        return None
    exact = [as_sympy(side.exact) for side in found.sides if isinstance(side, Value)]
    if len(exact) != len(found.sides) or not exact[-2].is_Symbol:
        return None
    solved = [side.subs(*exact[-2:]) for side in exact]
    is_solution = all(values.same(*pair) for pair in zip(solved[::2], solved[1::2], strict=True))
    return found.sides[-1] if is_solution else None


def _is_rounding(found: Chain) -> bool:
    """Whether it is an exact value, in any number of equal forms, and then the decimal that it
    rounds to: of more, or of values that are only near each other, each would be a candidate."""
    if found.signs.count(r"\approx") != 1 or found.signs[-1] != r"\approx":
        return False
    sides = [side for side in found.sides if isinstance(side, Value)]
    if len(sides) != len(found.sides) or any(s not in ("=", r"\approx") for s in found.signs):
        return False
    if not all(equal(one, other) for one, other in pairwise(sides[:-1])):
        return False
    exact, decimal = sides[-2:]
    return rounds_to(exact, decimal) or (len(sides) == 2 and rounds_to(decimal, exact))


def _is_unknown(side: Answer) -> bool:
    """Whether it is an expression with variables."""
    return isinstance(side, Value) and bool(as_sympy(side.exact).free_symbols)


def _is_called(side: Answer) -> bool:
    """Whether it is a name that is no expression: of a probability, an area, an angle."""
    return isinstance(side, Text) and any(one.fullmatch(side.words) for one in (_CALLED, _SUM))


def _as_chain(named: Named) -> Chain:
    """`y = 2x` as the equation that it also is."""
    name, value = readings(named.name), named.value
    if not name:
        return Chain(sides=(value,), signs=())
    if isinstance(value, Group) and value.opening in ("(", "[") and len(value.items) == 2:
        low, high = value.items  # of `x < 5`, the side that has an end
        if isinstance(low, Value) and _is_infinite(low):
            sign = "<" if value.closing == ")" else r"\le"
            return Chain(sides=(name[0], high), signs=(sign,))
        if isinstance(high, Value) and _is_infinite(high):
            sign = ">" if value.opening == "(" else r"\ge"
            return Chain(sides=(name[0], low), signs=(sign,))
    return Chain(sides=(name[0], value), signs=(named.sign,))


def _is_infinite(value: Value) -> bool:
    return not isinstance(value.exact, Fraction) and bool(value.exact.is_infinite)


def _relations(reference: Chain, found: Chain) -> bool:
    if reference.signs == found.signs and _in_order(reference.sides, found.sides):
        return True
    if {*reference.signs, *found.signs} & _BETWEEN_STATEMENTS:
        both_ways = {*reference.signs, *found.signs} == {r"\iff"}
        return both_ways and _in_order(reference.sides, found.sides[::-1])
    one, other = _difference(reference), _difference(found)
    if one is None or other is None:
        return False
    constant = values.ratio(one, other)
    if constant is None or not constant.is_real:
        return False
    sign = found.signs[0]
    if constant < 0:
        sign = FLIPPED.get(sign, sign)
    return reference.signs[0] == sign


def _difference(chain: Chain) -> Expr | None:
    left, right = _term(chain.sides[0]), _term(chain.sides[-1])
    if len(chain.sides) != 2 or not (isinstance(left, Value) and isinstance(right, Value)):
        return None
    return as_sympy(left.exact) - as_sympy(right.exact)


def _term(side: Answer) -> Answer:
    """The side of an equation, where `CD` is a length and no Roman numeral."""
    if isinstance(side, Text) and side.words.isupper() and not side.is_set:
        return value_of(side.words) or side
    return side


def _groups(reference: Answer, found: Answer) -> bool:
    if isinstance(found, Group) and not isinstance(reference, Group) and not found.opening:
        return all(equal(reference, item) for item in found.items)  # `3/4 or 0.75` is one answer
    if not isinstance(reference, Group) or not isinstance(found, Group):
        group, other = (reference, found) if isinstance(reference, Group) else (found, reference)
        assert isinstance(group, Group)
        return group.opening == ":" and isinstance(other, Value) and _is_quotient(group, other)
    if same_set(reference, found):
        return True
    if reference.opening == found.opening == ":":
        return _in_order(reference.items, found.items) or _in_proportion(reference, found)
    one, other_ = reference.opening + reference.closing, found.opening + found.closing
    one, other_ = one.replace("u", ""), other_.replace("u", "")
    if one != other_ and not ("" in (one, other_) and {one, other_} <= _LEFT_OUT):
        return False
    if one == other_ == "{}":
        return _any_order(_distinct(reference.items), _distinct(found.items))
    if _says_which(reference) and not any(isinstance(item, Named) for item in found.items):
        return _in_order(reference.items, found.items)
    if {one, other_} <= {"", "{}"}:
        return _any_order(reference.items, found.items)
    return _in_order(reference.items, found.items)


def _says_which(group: Group) -> bool:
    """`a = 1, b = 2`: answers without names have to be in its order."""
    names = [item.name for item in group.items if isinstance(item, Named)]
    return len(set(names)) == len(group.items) > 1


def _distinct(items: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """Elements of a set, in which nothing is twice."""
    kept: list[Answer] = []
    for item in items:
        if not any(equal(one, item) for one in kept):
            kept.append(item)
    return tuple(kept)


def _in_proportion(reference: Group, found: Group) -> bool:
    """`6:4` is `3:2`; what may be a time of day, `3:45` and `1:15`, is itself alone."""
    one, other = _parts(reference), _parts(found)
    if len(one) != len(other) or not one or 0 in one or 0 in other:
        return False
    if any(_may_be_time(parts) for parts in (one, other)):
        return False
    return all(r * other[0] == f * one[0] for r, f in zip(one, other, strict=True))


def _parts(ratio: Group) -> list[Fraction]:
    parts = [item.exact for item in ratio.items if isinstance(item, Value)]
    return [part for part in parts if isinstance(part, Fraction)]


def _may_be_time(parts: list[Fraction]) -> bool:
    return parts[0] <= 24 and all(10 <= part < 60 and part.denominator == 1 for part in parts[1:])


def _is_quotient(ratio: Group, value: Value) -> bool:
    parts = _parts(ratio)
    if len(parts) != 2 or len(ratio.items) != 2 or parts[1] == 0:
        return False
    return value.exact == parts[0] / parts[1]


def _in_order(reference: tuple[Answer, ...], found: tuple[Answer, ...]) -> bool:
    return len(reference) == len(found) and all(
        equal(one, other) for one, other in zip(reference, found, strict=True)
    )


def _any_order(reference: tuple[Answer, ...], found: tuple[Answer, ...]) -> bool:
    if len(reference) != len(found):
        return False
    left = list(found)
    for one in reference:
        match = next((index for index, other in enumerate(left) if equal(one, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _all_near(chain: Chain) -> bool:
    """Whether it is a reference's approximation: a row is trusted to round as it likes."""
    return all(near(one, other) for one, other in pairwise(chain.sides))
