"""What a reward function may return, and what is made of it.

A number in [0, 1], or a mapping whose `reward` is one and whose other entries are finite numbers.
Numbers are int, float, bool, Decimal, Fraction, and the scalars of numpy and torch. Anything else
is a bug in the function: it is named, and never taken for a wrong answer.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Real
from typing import NamedTuple

from sfpo_megatron.outputs.declared import is_metric_name
from sfpo_megatron.plugins import Foreign

_NUMBER = "a finite number"
_REWARD = "a number in [0, 1], or a mapping with one as 'reward'"


class Scored(NamedTuple):
    """A reward and the other entries of what the function returned."""

    reward: float
    parts: dict[str, float]


class NotAScore(Exception):
    """A function returned what is no score: `found ..., expected ...`."""

    def __init__(self, value: Foreign, expected: str, *, where: str = "") -> None:
        super().__init__(f"found {where}{shown(value)}, expected {expected}")


def scored(value: Foreign) -> Scored:
    """The score that a function's return value is; NotAScore if it is none."""
    if not isinstance(value, Mapping):
        return Scored(_reward(value), {})
    if "reward" not in value:
        raise NotAScore(value, "an entry 'reward'")
    parts = {}
    for name, entry in value.items():
        if not is_metric_name(name):
            raise NotAScore(name, "printable text", where="an entry named ")
        if name != "reward":
            parts[name] = _number(entry, _NUMBER, where=f"{name!r}: ")
    return Scored(_reward(value["reward"], where="'reward': "), parts)


def each_of(value: Foreign, num_responses: int) -> list[Foreign]:
    """What a batched function returned, one value a response; NotAScore if it is no such list."""
    expected = f"a list of {num_responses}, one entry a response"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise NotAScore(value, expected)
    values = list(value)
    if len(values) != num_responses:
        raise NotAScore(value, expected, where=f"{len(values)} entries in ")
    return values


def shown(value: Foreign) -> str:
    """A value for a message: its type, and what fits of its repr."""
    try:
        text = reprlib.repr(value)
    except Exception as error:  # a user's __repr__
        text = f"<its repr raised {type(error).__name__}>"
    return "None" if value is None else f"{text} ({type(value).__name__})"


def _reward(value: Foreign, where: str = "") -> float:
    reward = _number(value, _REWARD, where=where)
    if not 0.0 <= reward <= 1.0:
        raise NotAScore(value, _REWARD, where=where)
    return reward


def _number(value: Foreign, expected: str, *, where: str) -> float:
    try:
        plain = _unwrapped(value)
        if isinstance(plain, Real | Decimal) and math.isfinite(number := float(plain)):
            return number + 0.0  # -0.0 is 0
    except Exception as error:  # OverflowError of a huge int; whatever a user's class raises
        raise NotAScore(value, expected, where=where) from error
    raise NotAScore(value, expected, where=where)


def _unwrapped(value: Foreign) -> Foreign:
    """A scalar of numpy or torch as Python's own; an array of one element is no scalar."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", ()) == () else value
