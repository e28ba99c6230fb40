r"""The last \boxed{} of the response equals the reference, as mathematics.

Fractions, sets, intervals, units...: `\frac{1}{2}`, `0.5` and `1/2` are one answer. A response
without a box is wrong, and so is a box with several candidates, so a model cannot gain by listing
them. `answers.py` says how an answer is read and `equality.py` when two are equal; `screen.py`
refuses what would take long, and the pool's limit ends the rest.
"""

from __future__ import annotations

import functools

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.answers import Answer, Group, Named, readings
from sfpo_megatron.rewards.boxes import boxes, last_boxed
from sfpo_megatron.rewards.equality import equal
from sfpo_megatron.rewards.thinking import STRIP, visible

__all__ = ["last_boxed", "readable", "same_answer", "score", "warm_up"]


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 if the answer is right, else 0."""
    reference = _reference(prompt.answer)
    found = boxes(visible(response, thinking))
    if not found:
        return 0.0
    if _right(reference, found[-1]):
        return 1.0
    # `\boxed{1331} and \boxed{1728}`: the last boxes together make the reference's list.
    size = max((_size(one) for one in reference), default=1)
    if not 1 < size <= len(found):
        return 0.0
    return float(_right(reference, ", ".join(found[-size:])))


def same_answer(reference: str, found: str) -> bool:
    """Whether two answers, without boxes, are the same; ValueError for a reference that is none."""
    return _right(_reference(reference), found)


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    try:
        _reference(answer)
    except ValueError as error:
        return str(error)
    return None


def warm_up() -> None:
    """Import sympy and the grammar of latex2sympy, which takes seconds."""
    same_answer(r"\sqrt{x+1}", r"(x+1)^{\frac{1}{2}}")
    same_answer(r"\sum_{k=1}^{2} k", "3")


@functools.lru_cache(maxsize=1024)
def _reference(answer: str) -> tuple[Answer, ...]:
    """The readings of a reference; of one with boxes, all of them together."""
    found = boxes(answer)
    parsed = readings(", ".join(dict.fromkeys(found)) if found else answer)
    if not parsed:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected a number or an expression in LaTeX; "
            "use reward.function=exact_match for answers that are none"
        )
    return parsed


def _right(reference: tuple[Answer, ...], found: str) -> bool:
    return any(equal(one, other) for other in readings(found) for one in reference)


def _size(answer: Answer) -> int:
    """How many answers a reference is."""
    if isinstance(answer, Named):
        return _size(answer.value)
    return len(answer.items) if isinstance(answer, Group) and answer.opening in ("", "{") else 1
