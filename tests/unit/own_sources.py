"""Sources of a user's, for test_data_own.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from types import MappingProxyType
from typing import Any

import numpy as np

from sfpo_megatron.config.tree import DataSource


def sums(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]:
    """Without end; every third is no problem."""
    number = source.args.get("first", 0) + seed
    while True:
        yield {"prompt": f"{number} + 1 =", "answer": number + 1, "level": 2}
        yield {"prompt": f"{number} + 2 =", "answer": f"{number + 2}"}
        yield {"prompt": "what?"}
        number += 1


def nonsense(source: DataSource, seed: int) -> Iterator[object]:
    """Without end, and no problem among them."""
    while True:
        yield 3


def broken(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]:
    yield {"prompt": "1 + 1 =", "answer": "2"}
    raise KeyError("no such column")


def leaves(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]:
    yield {"prompt": "1 + 1 =", "answer": "2"}
    raise SystemExit(0)


def no_rows(source: DataSource, seed: int) -> int:
    return 3


def odd(source: DataSource, seed: int) -> Iterator[object]:
    """What rows come as from elsewhere; the first alone is one."""
    yield MappingProxyType({"prompt": "1 + 1 =", "answer": 2, "levels": (1, [2, None])})
    yield ("2 + 2 =", "4")
    yield {"prompt": "3 + 3 =", "answer": "6", "made": date(2026, 1, 1)}
    yield {"prompt": "4 + 4 =", "answer": "8", "image": b"png"}
    yield {"prompt": "5 + 5 =", "answer": np.int64(10)}


def wrong_form(source: DataSource) -> list[Mapping[str, Any]]:
    return []
