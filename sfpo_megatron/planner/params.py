"""Which params a rank holds, in Megatron's order, and how its DDP buffers lay them out. No torch.

Checked against Megatron's own buffers, byte for byte, by tests/dist/test_planner.py. Source of the
layout: megatron/core/distributed/param_and_grad_buffer.py (params in reverse order, each from a
multiple of 64 elements, buckets padded to a multiple of lcm(data-parallel size, 128)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape

_PARAM_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
Spec = Literal["local", "te"]
"""Megatron's layer spec: torch's modules, or TransformerEngine's."""


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
    parallel, settings = config.parallel, config.megatron.transformer
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline or 1
    starts = [0]
    for count in _layers_of_stages(shape.num_layers, pipeline * virtual, settings):
        starts.append(starts[-1] + count)
    found = []
    for index in range(stage, pipeline * virtual, pipeline):
        layers = tuple(range(starts[index], starts[index + 1]))
        last = index == pipeline * virtual - 1
        found.append(Chunk(layers=layers, first=index == 0, last=last))
    return found


def _layers_of_stages(layers: int, stages: int, settings: dict[str, Any]) -> list[int]:
    ends = [
        settings.get(f"num_layers_in_{end}_pipeline_stage") if stages > 1 else None
        for end in ("first", "last")
    ]
    given = [n for n in ends if n is not None]
    middle = stages - len(given)
    even, more = divmod(layers - sum(given), middle) if middle else (0, 0)
    counts = [even + (i < more) for i in range(middle)]
    first, last = ends
    return [*([first] if first else []), *counts, *([last] if last else [])]


def params_of(
    shape: ModelShape, parallel: ParallelConfig, chunk: Chunk, spec: Spec = "te"
) -> list[Param]:
    """In the order of the module's parameters."""
    tensor, hidden = parallel.tensor, shape.hidden_size
    vocabulary = shape.padded_vocab_size(tensor) // tensor * hidden
    found = []
    if chunk.first:
        shared = shape.tied_embeddings and not chunk.last  # on one stage there is one copy
        found.append(Param(name="embedding", numel=vocabulary, shared_embedding=shared))
    for layer in chunk.layers:
        dense = shape.moe is None or layer < shape.moe.num_dense_layers
        found += _layer(shape, parallel, dense, spec)
    if chunk.last:
        found.append(Param(name="final_layernorm", numel=hidden))
        if not shape.tied_embeddings:
            found.append(Param(name="output_layer", numel=vocabulary))
        elif not chunk.first:  # a copy of the embedding, on another stage
            found.append(Param(name="output_layer", numel=vocabulary, shared_embedding=True))
    return found


@functools.lru_cache(maxsize=512)
def _layer(
    shape: ModelShape, parallel: ParallelConfig, dense: bool, spec: Spec
) -> tuple[Param, ...]:
    fused = spec == "te"
    attention = _attention_params(shape, parallel, fused=fused)
    if dense:
        return (*attention, *_mlp_params(shape, parallel))
    return (*attention, *_expert_params(shape, parallel, fused=fused))


def _attention_params(
    shape: ModelShape, parallel: ParallelConfig, *, fused: bool
) -> Iterator[Param]:
    """`fused`: TE's linear layers hold the norm in front of them."""
    hidden, tensor = shape.hidden_size, parallel.tensor
    norm = Param(name="input_layernorm", numel=hidden)
    if not fused or shape.mla is not None:
        yield norm
    if shape.mla is None:
        heads = shape.num_heads * shape.head_dim
        qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
        yield Param(name="linear_proj", numel=hidden * heads // tensor)
        if fused:
            yield norm
        yield Param(name="linear_qkv", numel=hidden * qkv // tensor)
        if shape.qkv_bias:
            yield Param(name="linear_qkv.bias", numel=qkv // tensor)
        for name in ("q_layernorm", "k_layernorm") if shape.qk_norm else ():
            yield Param(name=name, numel=shape.head_dim)
    else:
        mla = shape.mla
        matrices = mla.matrices(hidden, shape.num_heads)
        linears = {name: math.prod(size) for name, size in matrices.items()}
        yield Param(name="linear_proj", numel=linears.pop("linear_proj") // tensor)
        norms = {n: Param(name=n, numel=size[1]) for n, size in matrices.items() if "up" in n}
        for name, numel in linears.items():  # every rank makes the short vectors whole
            if fused and name in norms:
                yield norms[name]
            yield Param(name=name, numel=numel if "down" in name else numel // tensor)
        yield from () if fused else norms.values()


def _mlp_params(shape: ModelShape, parallel: ParallelConfig) -> Iterator[Param]:
    """The norm comes first, whichever module holds it."""
    size = shape.ffn_size * shape.hidden_size // parallel.tensor
    yield Param(name="pre_mlp_layernorm", numel=shape.hidden_size)
    yield Param(name="linear_fc1", numel=2 * size)
    yield Param(name="linear_fc2", numel=size)


def _expert_params(shape: ModelShape, parallel: ParallelConfig, *, fused: bool) -> Iterator[Param]:
    """`fused`: TE's grouped linear layers, all first ones before all second ones."""
    moe, hidden = shape.moe, shape.hidden_size
    assert moe is not None
    yield Param(name="pre_mlp_layernorm", numel=hidden)
    yield Param(name="router", numel=moe.num_experts * hidden)
    size = moe.ffn_size * hidden // parallel.expert_tensor
    names = [(e, n) for e in range(moe.num_experts // parallel.expert) for n in (1, 2)]
    for expert, number in sorted(names, key=lambda pair: pair[1]) if fused else names:
        numel = 2 * size if number == 1 else size
        yield Param(name=f"{expert}.linear_fc{number}", numel=numel, expert=True)
    if moe.shared_ffn_size:
        size = moe.shared_ffn_size * hidden // parallel.tensor
        yield Param(name="shared.linear_fc1", numel=2 * size)
        yield Param(name="shared.linear_fc2", numel=size)


@dataclass(kw_only=True, frozen=True, slots=True)
class Buffer:
    """A DDP buffer."""

    numel: int
    """Padding included."""
    ranks: int
    """Data-parallel ranks; 1 where each owns all of it."""
    buckets: tuple[tuple[int, int], ...]
    """Where each begins and ends; a rank owns the same part of every one."""
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
    """Of params of one kind (dense, or expert), over `ranks` data-parallel ranks. `sharded`: for
    the distributed optimizer; without it nothing is padded and every rank owns all."""
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
