"""Rotary embeddings as config.json describes them: scaling and frequencies. No torch.

Formulas: transformers/modeling_rope_utils.py (`linear`, `llama3`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Kind = Literal["linear", "llama3"]
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(kw_only=True, frozen=True, slots=True)
class RopeScaling:
    """How a model stretches its rotary frequencies to longer contexts."""

    kind: Kind
    factor: float
    low_freq_factor: float = 1.0
    """llama3: below context / this in wavelengths, frequencies stay."""
    high_freq_factor: float = 4.0
    """llama3: above context / this, they are divided by `factor`; between, blended."""
    original_max_position: int = 8192
    """llama3: the context that the model was first trained on."""


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4)."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    return {**found, "rope_type": kind, "rope_theta": float(theta)}


def refused_rope(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """(found, expected, what to do) of what a config.json asks for and nobody here does."""
    rope = rope_settings(config)
    kind, fix = rope["rope_type"], "restore the model's config.json"
    if kind not in ("default", *get_args(Kind)):
        expected = f"rope type default, {' or '.join(get_args(Kind))}"
        yield f"rope type {kind}", expected, "use a model without it"
        return
    if kind != "default" and not rope.get("factor"):
        yield f"rope type {kind} without a factor", "one", fix
    for name in _LLAMA3 if kind == "llama3" else ():
        if not rope.get(name):
            yield f"rope type llama3 without {name}", "a number", fix
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        expected = "rotary embeddings on the whole head"
        yield f"partial_rotary_factor {partial}", expected, "choose another model"


def rope_scaling(config: dict[str, Any]) -> RopeScaling | None:
    """The scaling of a config.json that `refused_rope` finds nothing in; None without one."""
    rope = rope_settings(config)
    kind, factor = rope["rope_type"], float(rope.get("factor") or 1.0)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    low, high, original = (rope[name] for name in _LLAMA3)
    return RopeScaling(
        kind=cast(Kind, kind),
        factor=factor,
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_max_position=int(original),
    )


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> list[float]:
    """Radians a position, of each of a head's head_dim / 2 pairs."""
    plain = [base ** -(2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in plain]
    return [_llama3(frequency, scaling) for frequency in plain]


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # in the original context
    if turns > high:
        return frequency
    if turns < low:
        return frequency / scaling.factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
