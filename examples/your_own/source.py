"""A data source of your own: `data: {train: [{source: "source:rows", size: 1000}]}`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from sfpo_megatron.config.tree import DataSource


def rows(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]:
    """Sums of two numbers, without end."""
    draw = random.Random(seed)
    while True:
        a, b = draw.randrange(source.args.get("below", 100)), draw.randrange(100)
        yield {"prompt": f"{a} + {b} =", "answer": str(a + b)}
