"""Layers over pipeline stages, by the arithmetic of Megatron's TransformerConfig. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape

LAYOUT = "pipeline_model_parallel_layout"
_SECTION = "megatron.transformer"
_ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_LETTERS = {"embedding": "E", "decoder": "t", "loss": "L"}
_MOST_TIMES = 1000
"""Repeats of a part of a layout that are written out: no model has as many layers."""


def parts_of(layout: Any) -> list[str]:
    """The parts of a layout, in the model's order, one for each chunk of each stage: E for the
    embedding, t for a layer, L for the loss, as PipelineParallelLayerLayout reads them."""
    if isinstance(layout, list):
        rows = [part if isinstance(part, list) else ["?"] for part in layout]
        names = [[str(name).strip().lower() for name in row] for row in rows]
        return ["".join(_LETTERS.get(name, "?") for name in row) for row in names]
    text = str(layout).replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, _written_out, text)
    return text.split("|")


def _written_out(repeated: re.Match[str]) -> str:
    digits = repeated[2][:9]  # Python reads no number of thousands of them
    return repeated[1] * min(int(digits), _MOST_TIMES)


def pipeline_stages(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """Can the layers be divided over the stages, evenly or as the config says?"""
    settings = config.megatron.transformer
    ends = [name for name in _ENDS if isinstance(settings.get(name), int)]
    counted = [name for name in _COUNTED if settings.get(name)]
    given = [LAYOUT] if settings.get(LAYOUT) else []
    ways = [names[0] for names in (given, ends, counted) if names]
    if len(ways) > 1:
        yield Problem(
            f"{_SECTION}.{ways[0]}",
            f"beside {ways[1]}",
            "one way to divide the layers",
            "remove one of the two",
        )
    elif given:
        yield from _by_hand(config, shape)
    elif ends:
        yield from _uneven_ends(config, shape, {name: settings[name] for name in ends})
    else:
        yield from _even(config, shape, len(counted))


def _by_hand(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    key, parts = f"{_SECTION}.{LAYOUT}", parts_of(config.megatron.transformer[LAYOUT])
    if len(parts) != stages * chunks:
        yield Problem(
            key,
            f"{len(parts)} parts",
            f"{stages * chunks}: {stages} stages x {chunks} chunks",
            "correct it, parallel.pipeline or parallel.virtual_pipeline",
        )
    elif (whole := "".join(parts)) != f"E{'t' * shape.num_layers}L":
        yield Problem(
            key,
            f"{whole.count('t')} layers" if set(whole) == set("EtL") else repr(whole[:60]),
            f"E, then the model's {shape.num_layers} layers (t each), then L",
            "correct it",
        )


def _uneven_ends(config: RunConfig, shape: ModelShape, ends: dict[str, int]) -> Iterator[Problem]:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    for name, count in ends.items():
        if count <= 0 or count % chunks:
            yield Problem(
                f"{_SECTION}.{name}",
                str(count),
                f"a multiple of parallel.virtual_pipeline ({chunks}), above 0",
                "correct it, or remove it",
            )
            return
    layers, middle = shape.num_layers - sum(ends.values()), stages - len(ends)
    is_shared = layers > 0 and middle > 0 and layers % (middle * chunks) == 0
    if not is_shared and (layers, middle) != (0, 0):
        yield Problem(
            f"{_SECTION}.{next(iter(ends))}",
            f"{layers} of {shape.num_layers} layers left for {middle} stages x {chunks} chunks",
            "layers that these stages can share evenly",
            "correct it, or parallel.pipeline",
        )


def _even(config: RunConfig, shape: ModelShape, counted: int) -> Iterator[Problem]:
    """`counted`: the embedding, the loss or both, as a layer each."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    layers = shape.num_layers + counted
    if layers % (stages * chunks):
        more = f", and {counted} counted as layers" if counted else ""
        divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        yield Problem(
            "parallel.pipeline",
            f"{stages} stages x {chunks} chunks",
            f"a divisor of the model's num_hidden_layers ({shape.num_layers}{more})",
            f"make pipeline x virtual_pipeline one of {divisors}",
        )
