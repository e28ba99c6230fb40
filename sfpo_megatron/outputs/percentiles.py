"""Percentiles by the nearest rank: each is one of the values, and an integer stays one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T", int, float)


def percentiles(values: Iterable[T], *percents: int) -> dict[str, T]:
    """`pN` -> the least value that N of a hundred do not exceed, and `max`; empty of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {f"p{p}": ordered[-(-p * len(ordered) // 100) - 1] for p in percents}
    return {**found, "max": ordered[-1]}
