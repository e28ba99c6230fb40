"""Which settings of a run that is resumed are others than when it was saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

WITHOUT_BEARING = (
    "output_dir",
    "checkpoint",
    "tracking",
    "trace",
    "debug",
    "train.num_steps",
    "train.num_epochs",
    "sft.num_steps",
    "sft.num_epochs",
)
"""Keys and sections that do not bear on the course of a run, a warm start's included."""


def changes(then: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, then, now) of every setting that bears on the course of a run and is another now;
    `then` and `now`: configs as plain trees."""
    if key in WITHOUT_BEARING:
        return
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            yield from changes(then.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif json.dumps(then) != json.dumps(now):
        yield key, then, now
