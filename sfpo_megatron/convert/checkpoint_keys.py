"""The place of a weight in a torch_dist checkpoint: its key and its place in the key's tensor.

Megatron stacks what its layers have alike: `decoder.layers.self_attention.linear_qkv.weight` is
[layers, ...], an expert's weight [layers, experts, ...]. Models whose layers differ have keys with
the layer's number, and `singleton_local_shards` keys with the expert's number, gate and up apart
(TransformerBlock.sharded_state_dict, apply_swiglu_sharded_factory).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sfpo_megatron.families.rule import Rule

_LAYER = re.compile(r"(?<=decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(?<=mlp\.experts\.experts\.)(\d+)\.")
_NO_WEIGHT = re.compile(
    r"(.+\.)?_extra_state(/.*)?|(optimizer|chained_\d+)\..*|(rng|rerun)_state.*"
)


Axis = Literal["layer", "expert"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Place:
    """One tensor of a checkpoint, or the rows of it at `index`."""

    key: str
    index: tuple[int, ...] = ()
    axes: tuple[Axis, ...] = ()
    """What the tensor's leading dimensions, those of `index`, count."""


def stacked(name: str) -> Place:
    """The place of our canonical `name` in a checkpoint that stacks layers and experts."""
    layer, expert = _LAYER.findall(name), _EXPERT.findall(name)
    axes: list[Axis] = ["layer"] * len(layer)
    axes += ["expert"] * len(expert)
    index = tuple(int(i) for i in (*layer, *expert))
    return Place(key=_EXPERT.sub("", _LAYER.sub("", name)), index=index, axes=tuple(axes))


def numbered(name: str) -> Place:
    """The place of our canonical `name` where layers differ: a key each, experts stacked in it."""
    index = tuple(int(i) for i in _EXPERT.findall(name))
    axes: list[Axis] = ["expert"] * len(index)
    return Place(key=_EXPERT.sub("", name), index=index, axes=tuple(axes))


def find(rule: Rule, keys: Container[str]) -> list[Place] | None:
    """The places of `rule`'s whole tensor: one, or two (gate and up) to be joined; None without
    it."""
    name = rule.megatron
    for place in (stacked(name), numbered(name), Place(key=name)):
        if place.key in keys:
            return [place]
    halves = [Place(key=f"{name}_{half}") for half in "wv"]
    return halves if rule.kind == "gate_up" and all(h.key in keys for h in halves) else None


def weights(keys: Iterable[str]) -> Iterator[str]:
    """`keys` without the optimizer, random states and what layers keep beside weights."""
    return (key for key in keys if not _NO_WEIGHT.fullmatch(key))
