"""Which params a rank holds, in Megatron's order, and how its DDP buffers lay them out. No torch.

Checked against Megatron's own buffers, byte for byte, by tests/dist/test_planner.py. Source of the
layout: megatron/core/distributed/param_and_grad_buffer.py (params in reverse order, each from a
multiple of 64 elements, buckets padded to a multiple of lcm(data-parallel size, 128)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfpo_megatron.config.rules.pipeline import LAYOUT, parts_of
from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import EMBEDDING, FINAL_NORM, OUTPUT, hf_shapes, layer_rules

_PARAM_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
Spec = Literal["local", "te"]
"""Megatron's layer spec: torch's modules, or TransformerEngine's."""
_MODULES = (
    *("input_layernorm", "linear_proj", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj", "linear_qkv"),
    *("q_layernorm", "k_layernorm", "kv_layernorm"),
    *("pre_mlp_layernorm", "router", "linear_fc1", "linear_fc2"),
)
"""The modules of a layer, as Megatron registers them; those of experts, then of shared ones, come
after the router in this order once more."""
_NORM_BEFORE = {
    "linear_q_up_proj": "q_layernorm",
    "linear_kv_up_proj": "kv_layernorm",
    "linear_qkv": "input_layernorm",
    "linear_fc1": "pre_mlp_layernorm",
}
"""The module of the norm that TransformerEngine fuses into a linear."""
_SHARED = ".shared_experts."


@dataclass(kw_only=True, frozen=True, slots=True)
class Param:
    """A tensor of one rank."""

    name: str
    numel: int
    expert: bool = False
    shared_embedding: bool = False
    """Tied: a bucket of its own."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Chunk:
    """The model, or a virtual pipeline stage's part of it."""

    layers: tuple[int, ...]
    first: bool
    last: bool


def chunks_of(shape: ModelShape, config: RunConfig, stage: int) -> list[Chunk]:
    """The chunks of pipeline stage `stage`, in order."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    starts = [0]
    for count in _layers_of_chunks(shape, config):
        starts.append(starts[-1] + count)
    found = []
    for index in range(stage, pipeline * virtual, pipeline):
        layers = tuple(range(starts[index], starts[index + 1]))
        last = index == pipeline * virtual - 1
        found.append(Chunk(layers=layers, first=index == 0, last=last))
    return found


def unlike_stages(shape: ModelShape, config: RunConfig) -> list[int]:
    """The pipeline stages among which the fullest is: the first, the last, and of those between the
    first of each kind, by its numbers of layers with and without experts."""
    stages: dict[tuple[tuple[bool, ...], ...], int] = {}
    last, dense = config.parallel.pipeline - 1, shape.num_dense_layers
    for stage in range(1, last):
        chunks = chunks_of(shape, config, stage)
        kind = tuple(tuple(layer < dense for layer in chunk.layers) for chunk in chunks)
        stages.setdefault(kind, stage)
    return sorted({0, last, *stages.values()})


def _layers_of_chunks(shape: ModelShape, config: RunConfig) -> list[int]:
    """The number of layers of each chunk, in the model's order, as Megatron has it
    (`get_num_layers_to_build`): each stage gets its number, divided by its chunks."""
    settings, pipeline = config.megatron.transformer, config.parallel.pipeline
    virtual = config.parallel.virtual_pipeline or 1
    if layout := settings.get(LAYOUT):
        return [part.count("t") for part in parts_of(layout)]
    # An embedding or a loss that counts as a layer; one is then missing where it is.
    embedding, loss = (
        bool(settings.get(f"account_for_{name}_in_pipeline_split"))
        for name in ("embedding", "loss")
    )
    counted = _layers_of_stages(shape.num_layers + embedding + loss, pipeline, settings)
    counts = [
        count // virtual + (chunk < count % virtual)  # without a rest; Megatron refuses another
        for chunk in range(virtual)
        for count in counted
    ]
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _layers_of_stages(layers: int, stages: int, settings: dict[str, Any]) -> list[int]:
    first, last = (
        settings.get(f"num_layers_in_{end}_pipeline_stage") if stages > 1 else None
        for end in ("first", "last")
    )
    given = [n for n in (first, last) if n is not None]
    middle = stages - len(given)
    even, more = divmod(layers - sum(given), middle) if middle else (0, 0)
    counts = [even + (i < more) for i in range(middle)]
    return [*([first] if first else []), *counts, *([last] if last else [])]


def params_of(
    shape: ModelShape, parallel: ParallelConfig, chunk: Chunk, spec: Spec = "te"
) -> list[Param]:
    """Parameters of a rank's chunk, in the order of the module's own."""
    tensor = parallel.tensor
    vocabulary = shape.padded_vocab_size(tensor) // tensor * shape.hidden_size
    tied = shape.tied_embeddings
    found = []
    if chunk.first:
        shared = tied and not chunk.last  # on one stage there is one copy
        found.append(Param(name=EMBEDDING.megatron, numel=vocabulary, shared_embedding=shared))
    for layer in chunk.layers:
        found += _layer(shape, parallel, layer < shape.num_dense_layers, spec)
    if chunk.last:
        found.append(Param(name=FINAL_NORM.megatron, numel=_numel(FINAL_NORM, shape, parallel)))
        if not tied or not chunk.first:  # tied: a copy of the embedding, on another stage
            found.append(Param(name=OUTPUT.megatron, numel=vocabulary, shared_embedding=tied))
    return found


@functools.lru_cache(maxsize=512)
def _layer(
    shape: ModelShape, parallel: ParallelConfig, dense: bool, spec: Spec
) -> tuple[Param, ...]:
    """The params of a layer, with an MLP or with experts, from the rules of its family."""
    rules = layer_rules(shape, 0 if dense else shape.num_layers - 1)
    held = sorted((r for r in rules if not r.frozen), key=lambda rule: _place(rule, spec))
    experts = [rule for rule in held if rule.expert]
    shared = [rule for rule in held if _SHARED in rule.megatron]
    num_experts = shape.moe.num_experts // parallel.expert if shape.moe else 0
    if spec == "te":  # grouped linear layers: all first ones before all second ones
        of_experts = [(rule, index) for rule in experts for index in range(num_experts)]
    else:
        of_experts = [(rule, index) for index in range(num_experts) for rule in experts]
    return tuple(
        Param(
            name=rule.megatron.format(layer="{layer}", expert=index),
            numel=_numel(rule, shape, parallel),
            expert=rule.expert,
        )
        for rule, index in (
            *((rule, 0) for rule in held if rule not in (*experts, *shared)),
            *of_experts,
            *((rule, 0) for rule in shared),
        )
    )


def _place(rule: Rule, spec: Spec) -> tuple[int, int]:
    """Rank of the param among those that Megatron registers in a layer. In TransformerEngine's
    layers the linear holds the norm in front of it, elsewhere that is a module of its own."""
    module, kind = rule.megatron.split(".")[-2:]
    if kind == "layer_norm_weight" and spec == "local":
        module, kind = _NORM_BEFORE[module], "weight"
    if module not in _MODULES:
        raise ValueError(
            f"{rule.megatron}: found the module {module}, expected one of {', '.join(_MODULES)}; "
            "add it to planner/params.py where Megatron's layer has it"
        )
    return _MODULES.index(module), ("layer_norm_weight", "weight", "bias").index(kind)


def _numel(rule: Rule, shape: ModelShape, parallel: ParallelConfig) -> int:
    """Elements of a rank's part."""
    whole = sum(math.prod(size) for size in hf_shapes(rule, shape))
    if rule.tp_dim is None:
        return whole
    return whole // (parallel.expert_tensor if rule.expert else parallel.tensor)


@dataclass(kw_only=True, frozen=True, slots=True)
class Buffer:
    """A DDP buffer."""

    numel: int
    """Padding included."""
    ranks: int
    """Data-parallel ranks; 1 where each owns all of it."""
    buckets: tuple[tuple[int, int], ...]
    """Begin and end of each; a rank owns the same part of every one."""
    gaps: tuple[tuple[int, int], ...]
    """Padding between params and after the last."""

    def owned(self, rank: int) -> int:
        """Elements of params in the parts of data-parallel rank `rank`."""
        total = 0
        for start, end in self.buckets:
            part = (end - start) // self.ranks
            low = start + rank % self.ranks * part
            padding = (
                max(0, min(hi, low + part) - max(lo, low)) for lo, hi in self.gaps if hi > low
            )
            total += part - sum(padding)
        return total


def buffer_of(
    params: Sequence[Param], *, ranks: int, bucket_size: int | None, sharded: bool
) -> Buffer:
    """The buffer of params of one kind (dense, or expert), over `ranks` data-parallel ranks.
    `sharded`: for the distributed optimizer; without it nothing is padded and every rank owns all.
    """
    if not sharded:
        total = sum(param.numel for param in params)
        return Buffer(numel=total, ranks=1, buckets=((0, total),), gaps=())
    unit = math.lcm(ranks, _BUCKET_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    bucket_start = end = 0  # `end`: of the last param

    def pad(multiple: int) -> int:
        padded = -(-end // multiple) * multiple
        if padded > end:
            gaps.append((end, padded))
        return padded

    for param in reversed(params):
        if param.shared_embedding and end > bucket_start:
            end = pad(unit)
            buckets.append((bucket_start, end))
            bucket_start = end
        end = pad(_PARAM_ALIGNMENT) + param.numel
        full = bucket_size is not None and end - bucket_start >= bucket_size
        if full or param.shared_embedding:
            end = pad(unit)
            buckets.append((bucket_start, end))
            bucket_start = end
    if end > bucket_start:
        end = pad(unit)
        buckets.append((bucket_start, end))
    return Buffer(numel=end, ranks=ranks, buckets=tuple(buckets), gaps=tuple(gaps))


def buffers_of(
    shape: ModelShape, config: RunConfig, stage: int, spec: Spec = "te"
) -> tuple[tuple[bool, Buffer], ...]:
    """(is of experts, buffer) of a rank of pipeline stage `stage`, one or two for each chunk."""
    assert config.parallel.data is not None, "resolve parallel.data first"
    ddp = config.megatron.ddp
    bucket_size = None
    if ddp.get("overlap_grad_reduce") and stage == 0:
        group = config.parallel.data * config.parallel.context
        bucket_size = int(ddp.get("bucket_size") or max(40_000_000, 1_000_000 * group))
    chunks = tuple(chunks_of(shape, config, stage))
    sharded = bool(ddp.get("use_distributed_optimizer", True))
    return _buffers(shape, config.parallel, chunks, bucket_size, sharded, spec)


@functools.lru_cache(maxsize=512)
def _buffers(
    shape: ModelShape,
    parallel: ParallelConfig,
    chunks: tuple[Chunk, ...],
    bucket_size: int | None,
    sharded: bool,
    spec: Spec,
) -> tuple[tuple[bool, Buffer], ...]:
    group = (parallel.data or 1) * parallel.context
    of_experts = group * parallel.tensor // (parallel.expert * parallel.expert_tensor)
    found = []
    for index, chunk in enumerate(chunks):
        params = params_of(shape, parallel, chunk, spec)
        size = bucket_size if index == 0 else None
        for expert, ranks in ((False, group), (True, of_experts)):
            own = [param for param in params if param.expert is expert]
            if own:
                buffer = buffer_of(own, ranks=ranks, bucket_size=size, sharded=sharded)
                found.append((expert, buffer))
    return tuple(found)
