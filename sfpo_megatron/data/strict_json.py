"""JSON of models and clients: what every reader of JSON has, and no deeper than one can write it.

Python reads more than that, and the run would say it again to engines, tools and clients.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn

from sfpo_megatron.types import Json

MOST_DEEP = 100
"""Lists and objects inside of one another. Schemas of tools have ten; Python's own limit depends on
how deep the caller stands, so that what was read could not always be written."""


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond the numbers that can be told")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


STRICT = json.JSONDecoder(parse_float=_float, parse_constant=_no_number)
"""Refuses NaN and Infinity, which Python writes and other readers refuse."""


def read_strict(text: str) -> Json:
    """The value of a JSON text; ValueError or RecursionError for what is none."""
    value: Json = STRICT.decode(text)
    require_shallow(value)
    return value


def require_shallow(value: Json) -> None:
    """ValueError for a value that is nested too deeply."""
    if is_deeper(value, MOST_DEEP):
        raise ValueError(f"it is nested deeper than {MOST_DEEP} lists and objects")


def is_deeper(value: Json, most: int) -> bool:
    """Whether more than `most` lists and objects are inside of one another."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
