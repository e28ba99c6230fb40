"""te.pytorch.DotProductAttention for packed (THD) causal self-attention, one sequence at a time."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        *,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        tp_size: int = 1,
        softmax_scale: float | None = None,
        window_size: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_dropout or tp_size != 1 or window_size not in (None, (-1, -1), (-1, 0)):
            raise NotImplementedError("dropout, tensor parallelism or a window")
        self.heads = num_attention_heads
        self.groups = num_gqa_groups or num_attention_heads
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [T, heads, d]
        key: Tensor,  # [T, groups, d]
        value: Tensor,  # [T, groups, d]
        attention_mask: Tensor | None = None,
        *,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        attn_mask_type: str = "causal",
        **_: Any,
    ) -> Tensor:  # [T, heads * d]
        if qkv_format != "thd" or "causal" not in attn_mask_type:
            raise NotImplementedError(f"{qkv_format} {attn_mask_type}: packed causal input only")
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
        ends = cu_seqlens_q.tolist()
        assert ends[0] == 0 and ends[-1] == query.shape[0], "cu_seqlens do not cover the pack"
        repeats = self.heads // self.groups
        rows = []
        for start, end in itertools.pairwise(ends):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            rows.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(rows)
