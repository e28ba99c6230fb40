"""Recomputed and offloaded activations, by what Megatron's TransformerConfig asserts. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

_WHOLE = "recompute_method: uniform and recompute_num_layers: 1"
_SECTION = "megatron.transformer"


def recompute(config: RunConfig) -> Iterator[Problem]:
    """Whether the settings say what is recomputed, and in units of how many layers."""
    given = config.megatron.transformer
    granularity, num = given.get("recompute_granularity"), given.get("recompute_num_layers")
    method = given.get("recompute_method")
    if granularity is None:
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            if given.get(name) is not None:
                yield Problem(
                    f"{_SECTION}.{name}",
                    f"{given[name]} without recompute_granularity, so that nothing is recomputed",
                    "full or selective beside it",
                    f"set {_SECTION}.recompute_granularity, or remove it",
                    "warning",
                )
    if granularity == "full":
        for name, value in (("recompute_method", method), ("recompute_num_layers", num)):
            if value is None:
                yield Problem(
                    f"{_SECTION}.recompute_granularity",
                    f"full without {name}",
                    "both recompute_method and recompute_num_layers beside it",
                    f"set {_WHOLE}, which keeps each layer's input",
                )
        if isinstance(num, int) and num < 1:
            yield Problem(
                f"{_SECTION}.recompute_num_layers", str(num), "1 or more", f"set {_WHOLE}"
            )
    if granularity == "selective" and num is not None:
        yield Problem(
            f"{_SECTION}.recompute_num_layers",
            f"{num} with recompute_granularity: selective",
            "null: parts of every layer are recomputed",
            f"remove it, or set recompute_granularity: full and {_WHOLE}",
        )
    if granularity and given.get("distribute_saved_activations") and config.parallel.sequence:
        yield Problem(
            f"{_SECTION}.distribute_saved_activations",
            "true with parallel.sequence",
            "false: they are distributed already",
            "remove it",
        )
    if given.get("cpu_offloading"):
        for name, is_set in (
            ("parallel.pipeline above 1", config.parallel.pipeline > 1),
            ("recompute_granularity", granularity),
        ):
            if is_set:
                yield Problem(
                    f"{_SECTION}.cpu_offloading",
                    f"true with {name}",
                    "one of the two",
                    "remove it: recompute saves the same memory",
                )
