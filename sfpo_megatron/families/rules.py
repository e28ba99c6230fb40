"""Operations on one weight: merge and split of qkv and gate-up, cut and join over tensor parallel.

A `Rule` ties one Megatron tensor to the Hugging Face tensors it is made of. Loading, export, refit
and converters all go through these functions, so a layout is written down once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sfpo_megatron.families.shape import ModelShape


@dataclass(kw_only=True, frozen=True, slots=True)
class Rule:
    """One Megatron tensor and its Hugging Face parts. In a family's table `{layer}` stands for the
    layer index and `{expert}` for the global expert index."""

    megatron: str
    hf: tuple[str, ...]
    kind: Literal["copy", "qkv", "gate_up", "vocab"] = "copy"
    tp_dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks; None: every rank has all of it."""
    expert: bool = False
    """Belongs to one expert: on one expert-parallel rank only, and cut over the expert's own
    tensor-parallel ranks."""
    frozen: bool = False
    """A buffer that no optimizer holds, so that SFPO does not reposition it: loaded, refitted and
    exported as it came, in fp32 where the model's dtype is another."""

    def at(self, *, layer: int, expert: int = 0) -> Rule:
        index = {"layer": layer, "expert": expert}
        return replace(
            self,
            megatron=self.megatron.format(**index),
            hf=tuple(name.format(**index) for name in self.hf),
        )


def dtype_of(rule: Rule, dtype: torch.dtype) -> torch.dtype:
    """In a model of `dtype`."""
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


def hf_shapes(rule: Rule, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the rule's Hugging Face parts, from the model's sizes alone."""
    hidden, d, moe = shape.hidden_size, shape.head_dim, shape.moe
    q, kv = shape.num_heads * d, shape.num_kv_heads * d
    name = rule.megatron
    ffn = shape.ffn_size
    if moe and (rule.expert or ".shared_experts." in name):
        ffn = moe.ffn_size if rule.expert else moe.shared_ffn_size
    if rule.kind == "vocab":
        return [(shape.vocab_size, hidden)]
    if rule.kind == "gate_up":
        return [(ffn, hidden)] * 2
    if rule.kind == "qkv":
        rest = (hidden,) if name.endswith("weight") else ()
        return [(q, *rest), (kv, *rest), (kv, *rest)]
    *_, module, kind = name.split(".")
    latent = shape.mla.matrices(hidden, shape.num_heads) if shape.mla else {}
    if module in latent:  # or the norm in front of it
        return [latent[module] if kind == "weight" else latent[module][1:]]
    if module == "linear_proj":
        return [(hidden, q)]
    if module == "linear_fc2":
        return [(hidden, ffn)]
    if module in ("q_layernorm", "k_layernorm"):
        return [(d,)]
    if module == "router" and moe:
        return [(moe.num_experts, hidden) if kind == "weight" else (moe.num_experts,)]
    return [(hidden,)]
