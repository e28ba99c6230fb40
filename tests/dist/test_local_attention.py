"""The torch attention over packs against float64 attention written out for each sequence.

Not exercised here: its speed (docs/numerics.md has figures).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import TP1, on_ranks
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

HEADS, GROUPS, DIM = 6, 2, 32
VALUE_DIM = 20
"""Under multi-head latent attention values have a width of their own."""
LENGTHS = {
    "even": [9, 8, 9, 10],
    "uneven": [3, 120, 1, 17, 2, 16, 64, 5],
    "one": [40],
    "single": [1],
}


def written_out(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None
) -> Tensor:
    """[T, heads, d], [T, groups, d], [T, groups, v] -> [T, heads * v]. `window`: how many keys
    before its own a query sees."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q, k) / DIM**0.5
        place = torch.arange(len(q))
        before = place[:, None] - place
        unseen = (before < 0) | (before > (len(q) if window is None else window))
        rows.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, -1e300).softmax(-1), v))
    return torch.cat(rows).flatten(1)


@on_ranks(
    TP1, name=list(LENGTHS), by_length=[False, True], value_dim=[DIM, VALUE_DIM], window=[None, 4]
)
def test_packed_attention(
    bench: Workbench, name: str, by_length: bool, value_dim: int, window: int | None
) -> None:
    """Values within 1e-6, gradients within 1e-5. `by_length`: sequences of like lengths go together
    as soon as padding would cost anything; else never."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from sfpo_megatron.mcore import local_spec

    lengths = LENGTHS[name]
    random = torch.Generator().manual_seed(2)
    sizes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, value_dim))
    inputs = [torch.randn(sum(lengths), *size, generator=random) for size in sizes]
    weights = torch.randn(sum(lengths), HEADS * value_dim, generator=random)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths),
    )  # fmt: skip
    config: Any = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
        window_attn_skip_freq=None,
        softmax_type="vanilla",
    )
    calls: list[int] = []

    class Counting(local_spec.PackedAttention):
        def _attend(self, *tensors: Any) -> Tensor:
            calls.append(1)
            return super()._attend(*tensors)

    layer = Counting(config, 1, AttnMaskType.causal, "self")
    ours = [x.clone().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_spec, "_PAIRS_OF_A_CALL", 0 if by_length else 10**9)
        got = layer(*ours, None, packed_seq_params=packed)
    assert (len(calls) > 1) == (by_length and name == "uneven")
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = written_out(*exact, lengths, window)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)
    found = torch.autograd.grad((got * weights).sum(), ours)
    for mine, theirs in zip(
        found, torch.autograd.grad((wanted * weights).sum(), exact), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5)
