r"""Sets of real numbers, whatever pieces they are written in: unions, differences, conditions.

`\reals \setminus \{0\}` and `(-\infty, 0) \cup (0, \infty)` are one set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfpo_megatron.rewards.answer_kinds import Answer, Group, Named
from sfpo_megatron.rewards.quantities import Value

if TYPE_CHECKING:
    from sympy import Expr, Set

MAX_PIECES = 20


def same_set(reference: Group, found: Group) -> bool:
    """Whether two groups, one of them a union or a difference, are one set of real numbers."""
    if not {reference.opening, found.opening} & {"u", "-"}:
        return False
    one, other = _set(reference), _set(found)
    return one is not None and one == other


def _set(answer: Answer) -> Set | None:
    import sympy

    if isinstance(answer, Named):
        return _set(answer.value)
    if not isinstance(answer, Group) or len(answer.items) > MAX_PIECES:
        return None
    if answer.opening in ("u", "-"):
        pieces = [_set(item) for item in answer.items]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        return sympy.Union(*known) if answer.opening == "u" else known[0] - sympy.Union(*known[1:])
    points = [_real(item) for item in answer.items]
    ends = [point for point in points if point is not None]
    if len(ends) < len(points):
        return None
    if answer.opening == "{":
        return sympy.FiniteSet(*ends)
    if len(ends) != 2 or answer.opening not in ("(", "["):
        return None
    return sympy.Interval(
        ends[0], ends[1], left_open=answer.opening == "(", right_open=answer.closing == ")"
    )


def _real(answer: Answer) -> Expr | None:
    import sympy

    if not isinstance(answer, Value) or answer.unit or answer.percent:
        return None
    exact = sympy.sympify(answer.exact)
    return exact if exact.is_extended_real and not exact.free_symbols else None
