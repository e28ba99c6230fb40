r"""The last \boxed{} of the response equals the reference, as mathematics.

Fractions, sets, intervals, units...: `\frac{1}{2}`, `0.5` and `1/2` are one answer. A response
without a box is wrong, and so is a box with several candidates, so a model cannot gain by listing
them. `answers.py` says how an answer is read and `equality.py` when two are equal; `hostile.py`
refuses what would take long, and the pool's limit ends the rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.answer_kinds import Answer, Group, Named
from sfpo_megatron.rewards.answers import readings
from sfpo_megatron.rewards.boxes import boxes, last_boxed
from sfpo_megatron.rewards.equality import equal
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.shown import shown
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation

__all__ = [
    "explain",
    "last_boxed",
    "read_as",
    "readable",
    "reference_as",
    "same_answer",
    "score",
    "warm_up",
]

_INTEGER = re.compile(r"-?[0-9]{1,18}")


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 if the answer is right, else 0."""
    reference = _reference(prompt.answer)
    return float(any(_right(reference, one) for one in _candidates(response, reference, thinking)))


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read: the last box, or the boxes that make the reference's list together."""
    reference = _reference(prompt.answer)
    found = list(_candidates(response, reference, thinking))
    right = (one for one in found if _right(reference, one))
    answer = next(right, found[0]) if found else None
    return {
        "found": answer,
        "read": [] if answer is None else read_as(answer),
        "reference": prompt.answer,
        "reference_read": reference_as(prompt.answer),
    }


def reference_as(answer: str) -> list[str]:
    """Every way in which a reference is read: by its boxes, or what follows its last `####`.
    ValueError for one that is none."""
    return [shown(one) for one in _reference(answer)]


def read_as(answer: str) -> list[str]:
    """Every way in which an answer was read, or why it was not."""
    why = refused(answer)
    return [shown(one) for one in readings(answer)] if why is None else [f"not read: {why}"]


def _candidates(response: str, reference: tuple[Answer, ...], thinking: str) -> Iterator[str]:
    """What may be the response's answer: its last box; `\\boxed{1331} and \\boxed{1728}`: the last
    boxes together, where the reference is a list of so many."""
    found = boxes(visible(response, thinking))
    if not found:
        return
    yield found[-1]
    size = max((_size(one) for one in reference), default=1)
    if 1 < size <= len(found):
        yield ", ".join(found[-size:])


def same_answer(reference: str, found: str) -> bool:
    """Whether two answers, without boxes, are the same; ValueError for a reference that is none."""
    return _right(_reference(reference), found)


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    if _INTEGER.fullmatch(answer):  # most rows of most sets, in a tenth of the time
        return None
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
    """The readings of a reference; of one with boxes, all of them together; of a worked solution as
    GSM8K has them what follows the last `####`."""
    found = boxes(answer)
    final = answer.rpartition("####")[2]
    parsed = readings(", ".join(dict.fromkeys(found)) if found else final)
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
