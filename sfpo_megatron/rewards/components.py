"""The means of what rewards say besides the reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol


class HasParts(Protocol):
    """A `types.Rollout` or a `pool.Score`."""

    @property
    def parts(self) -> Mapping[str, float]: ...


def part_means(scored: Iterable[HasParts], prefix: str) -> dict[str, float]:
    """`prefix` + NAME -> mean over those that have a part of this name, in order of appearance."""
    values: dict[str, list[float]] = {}
    for one in scored:
        for name, value in one.parts.items():
            values.setdefault(f"{prefix}{name}", []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}
