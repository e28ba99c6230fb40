"""Operations on a weight: merge and split of qkv and gate-up, cut and join over tensor parallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape


def dtype_of(rule: Rule, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a rule's tensor has in a model of `dtype`: fp32 where it is not trained."""
    return torch.float32 if rule.frozen else dtype


def merge(rule: Rule, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Hugging Face parts -> the whole Megatron tensor.

    linear_qkv is laid out by kv group: [q of the group's heads, k, v] for each group
    (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors).
    """
    if rule.kind == "qkv":
        q, k, v = (part.view(shape.num_kv_heads, -1, *part.shape[1:]) for part in parts)
        return torch.cat([q, k, v], dim=1).reshape(-1, *parts[0].shape[1:])
    if rule.kind == "gate_up":
        return torch.cat(list(parts), dim=0)
    (only,) = parts
    return only


def split(rule: Rule, whole: Tensor, shape: ModelShape) -> list[Tensor]:
    """The whole Megatron tensor -> its Hugging Face parts (inverse of `merge`)."""
    if rule.kind == "qkv":
        rest = whole.shape[1:]
        per_group = whole.view(shape.num_kv_heads, -1, *rest)
        q_rows = shape.num_heads // shape.num_kv_heads * shape.head_dim
        q, k, v = per_group.split([q_rows, shape.head_dim, shape.head_dim], dim=1)
        return [part.reshape(-1, *rest) for part in (q, k, v)]
    if rule.kind == "gate_up":
        return list(whole.chunk(2, dim=0))
    if rule.kind == "vocab":
        return [whole[: shape.vocab_size]]
    return [whole]


def cut(rule: Rule, whole: Tensor, shape: ModelShape, *, rank: int, size: int) -> Tensor:
    """Tensor-parallel rank `rank`'s shard of the whole Megatron tensor."""
    if rule.kind == "vocab":
        missing = shape.padded_vocab_size(size) - whole.shape[0]
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])]) if missing else whole
    if rule.tp_dim is None or size == 1:
        return whole
    if rule.kind == "gate_up":  # each rank holds its slice of gate above its slice of up
        halves = [half.chunk(size, dim=0)[rank] for half in whole.chunk(2, dim=0)]
        return torch.cat(halves, dim=0)
    return whole.chunk(size, dim=rule.tp_dim)[rank]


def join(rule: Rule, shards: Sequence[Tensor]) -> Tensor:
    """All tensor-parallel shards -> the whole Megatron tensor (inverse of `cut`, padding kept)."""
    if rule.tp_dim is None or len(shards) == 1:
        return shards[0]
    if rule.kind == "gate_up":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves], dim=0)
    return torch.cat(list(shards), dim=rule.tp_dim)
