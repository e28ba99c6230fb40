"""A run's config as services show it: one value for each dotted key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from sfpo_megatron.config.tree import RunConfig

Setting: TypeAlias = str | int | float | bool
Plain: TypeAlias = "Mapping[str, Plain] | list[Plain] | tuple[Plain, ...] | Setting | None"


def settings(config: RunConfig) -> dict[str, Setting]:
    """`train.optimizer.lr` -> 1e-6 and so on; None as `null`, what is empty as `{}` or `[]`."""
    return dict(_leaves(dataclasses.asdict(config), ""))


def _leaves(tree: Plain, key: str) -> Iterator[tuple[str, Setting]]:
    if isinstance(tree, Mapping):
        named = {str(name): value for name, value in tree.items()}
        empty = "{}"
    elif isinstance(tree, list | tuple):
        named = {str(index): value for index, value in enumerate(tree)}
        empty = "[]"
    else:
        yield key, "null" if tree is None else tree
        return
    if not named:
        yield key, empty
    for name, value in named.items():
        yield from _leaves(value, f"{key}.{name}" if key else name)
