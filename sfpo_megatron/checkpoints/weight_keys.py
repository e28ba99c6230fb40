"""The place of a weight in a torch_dist checkpoint: its key and its place in the key's tensor.
No torch.

Megatron stacks what its layers have alike: `decoder.layers.self_attention.linear_qkv.weight` is
[layers, ...], an expert's weight [layers, experts, ...]. Models whose layers differ have keys with
the layer's number, and `singleton_local_shards` keys with the expert's number, gate and up apart
(TransformerBlock.sharded_state_dict, apply_swiglu_sharded_factory).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import hf_shapes, rules_of

log = logging.getLogger(__name__)

_LAYER = re.compile(r"(?<=decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(?<=mlp\.experts\.experts\.)(\d+)\.")
_NO_WEIGHT = re.compile(
    r"(.+\.)?_extra_state(/.*)?|(optimizer|chained_\d+)\..*|(rng|rerun)_state.*"
)
_MTP = "mtp."
"""Beginning of the keys of multi-token prediction layers, which no model here has."""
Sizes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Key -> shape of every tensor of a checkpoint."""


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


def weight_places(
    directory: Path, shape: ModelShape, sizes: Sizes
) -> list[tuple[Rule, list[Place]]]:
    """Every rule of a model with its places in the checkpoint at `directory`, whose tensors are
    `sizes`. CheckpointError names a key that no rule consumes, a rule without its key, and a tensor
    of another shape: Megatron's own loader passes over the first, and fills up a short vocabulary
    with zeros."""
    rules = rules_of(shape)
    found = {rule.megatron: places for rule in rules if (places := find(rule, sizes))}
    missing = [rule.megatron for rule in rules if rule.megatron not in found]
    used = {place.key for places in found.values() for place in places}
    unknown = set(weights(sizes)) - used
    left_out = {key for key in unknown if key.startswith(_MTP)}
    for problem, names in (
        ("no key for", missing),
        ("no rule for key", sorted(unknown - left_out)),
    ):
        if names:
            raise CheckpointError(
                f"{directory}: found {problem} {', '.join(names[:5])} ({len(names)} in all), "
                f"expected the tensors of a {shape.family} model; is it this config.json's?"
            )
    for rule in rules:
        _check_shape(directory, shape, rule, found[rule.megatron], sizes)
    if left_out:
        log.warning(
            "%s: %d tensors of multi-token prediction layers are left out: they are not trained, "
            "and what is written has none",
            directory,
            len(left_out),
        )
    return [(rule, found[rule.megatron]) for rule in rules]


def _check_shape(
    directory: Path, shape: ModelShape, rule: Rule, places: list[Place], sizes: Sizes
) -> None:
    leading, parts = len(places[0].index), hf_shapes(rule, shape)
    counts = {"layer": shape.num_layers, "expert": shape.moe.num_experts if shape.moe else 0}
    rows, *rest = sum(part[0] for part in parts), *parts[0][1:]
    expected = (*(counts[axis] for axis in places[0].axes), rows, *rest)
    shapes = [sizes[place.key] for place in places]
    found = sum(sum(size[leading : leading + 1]) for size in shapes)
    if rule.kind == "vocab":
        found = min(found, rows)  # padding is cut
    if any((*size[:leading], found, *size[leading + 1 :]) != expected for size in shapes):
        raise CheckpointError(
            f"{directory}: {places[0].key}: found shape {shapes[0]}, expected {expected} from "
            "config.json; is it this config.json's checkpoint?"
        )
