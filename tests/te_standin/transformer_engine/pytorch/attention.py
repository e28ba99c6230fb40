"""te.pytorch.DotProductAttention for packed (THD) causal self-attention, one sequence at a time.

Under context parallelism every rank has two chunks of each sequence, one and its mirror image, and
cu_seqlens are of whole sequences, as in TE. TE passes keys and values around; here all
ranks gather everything, attend, and keep their part.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.exchange import gather_tokens


def _places(ends: list[int], size: int) -> Tensor:
    """Places in the whole pack of the tokens of rank 0, then 1, ..."""
    places = []
    for rank in range(size):
        for start, end in itertools.pairwise(ends):
            chunks = torch.arange(start, end).chunk(2 * size)
            places += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(places)


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
        cp_group: dist.ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_dropout or window_size not in (None, (-1, -1), (-1, 0)):
            raise NotImplementedError("dropout or a window")
        self.heads = num_attention_heads // tp_size  # of this rank
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.softmax_scale = softmax_scale
        self.context_group = cp_group

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
        assert (query.shape[1], key.shape[1]) == (self.heads, self.groups), "heads of other ranks"
        ends = cu_seqlens_q.tolist()
        group = self.context_group
        if group is not None and group.size() > 1:
            places = _places(ends, group.size())
            restore = torch.argsort(places)
            query, key, value = (gather_tokens(x, group)[restore] for x in (query, key, value))
            whole = self._attend(query, key, value, ends)
            return whole[places.chunk(group.size())[group.rank()]]
        return self._attend(query, key, value, ends)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
        assert ends[0] == 0 and ends[-1] == query.shape[0], "cu_seqlens do not cover the pack"
        # TE copies what does not have one common layout: no view of the fused qkv stays alive.
        packed = (x.contiguous() for x in (query, key, value))
        result: Tensor = _Attention.apply(*packed, ends, self.softmax_scale)
        return result


class _Attention(torch.autograd.Function):
    """Keeps what the flash kernels behind TE keep: q, k, v of the pack, the output, and the
    log-sum-exp of each row in fp32. The backward attends again, sequence by sequence."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float | None
    ) -> Tensor:
        rows, sums = [], []
        for start, end in itertools.pairwise(ends):
            q, k, v = _heads(query, key, value, start, end)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, scale=scale
            )
            rows.append(out[0, ..., : value.shape[-1]].transpose(0, 1).flatten(1))
            sums.append(lse.float().flatten())
        output = torch.cat(rows)
        ctx.save_for_backward(query, key, value, output, torch.cat(sums))
        ctx.ends, ctx.scale = ends, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in ctx.saved_tensors[:3])
        for start, end in itertools.pairwise(ctx.ends):
            with torch.enable_grad():
                q, k, v = _heads(*inputs, start, end)
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=ctx.scale)
                out = out[..., : inputs[2].shape[-1]]
                torch.autograd.backward(out[0].transpose(0, 1).flatten(1), grads[0][start:end])
        return (*(x.grad for x in inputs), None, None)


def _heads(
    query: Tensor, key: Tensor, value: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence as [1, heads, tokens, d], keys and values repeated for all heads; values as wide
    as keys, which torch's kernel wants and TE's do not."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
    v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
    return q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
