"""The refit's plan in integers, and the pieces it cuts; checksums that add up.

Reference: `families.operations.cut` and `merge`, which loading uses. Not exercised: process groups
(tests/dist/test_export.py writes real shards).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from made.models import MODEL_JSON
from torch import Tensor

from sfpo_megatron.families.operations import cut, merge
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape, model_shape
from sfpo_megatron.families.table import hf_shapes, rules_of
from sfpo_megatron.resharding import checksums
from sfpo_megatron.resharding.checksums import checksum
from sfpo_megatron.resharding.plan import (
    Holder,
    Piece,
    even_dim,
    pieces_of,
    plan_refit,
    plan_streams,
)


def shape_of(**changes: Any) -> ModelShape:
    return model_shape(MODEL_JSON | changes)


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "head_dim": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


FEW_KV_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
ONE_KV_HEAD = {"num_key_value_heads": 1}


def full_tensors(rule: Rule, shape: ModelShape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(rule.megatron))
    return [torch.randn(size, generator=generator) for size in hf_shapes(rule, shape)]


def region_of(shard: Tensor, piece: Piece) -> Tensor:
    """The piece's values, shaped as in the full tensor."""
    if piece.groups == 1:
        length = piece.stop - piece.start
        return shard.narrow(piece.dim, piece.source_start, length)
    blocks = shard.view(piece.groups, -1, *shard.shape[1:])
    return blocks[:, piece.source_start : piece.source_stop].reshape(-1, *shard.shape[1:])


PIECES = {
    "qwen2-1": (1, {}),
    "qwen2-2": (2, {}),
    "qwen3_moe-1": (1, MOE),
    "qwen3_moe-2": (2, MOE),
    "few_kv_heads-4": (4, FEW_KV_HEADS),
    "few_kv_heads-8": (8, FEW_KV_HEADS),
    "one_kv_head-2": (2, ONE_KV_HEAD),
}


@pytest.mark.parametrize(("size", "changes"), PIECES.values(), ids=PIECES)
def test_pieces_put_a_cut_tensor_together(size: int, changes: dict[str, Any]) -> None:
    """101 words on 2 ranks: the padding is nobody's; 3 heads a kv group: qkv is interleaved. Fewer
    kv heads than ranks: a rank has a part of a group, or two parts or three."""
    shape = shape_of(**changes)
    for rule in rules_of(shape):
        parts = full_tensors(rule, shape)
        whole = merge(rule, parts, shape)
        found = [torch.full_like(part, torch.nan) for part in parts]
        sums = [0] * len(parts)
        for rank in range(size):
            shard = cut(rule, whole, shape, rank=rank, size=size)
            for piece in pieces_of(rule, shape, rank=rank, size=size):
                region = region_of(shard, piece)
                target = found[piece.part]
                target.narrow(piece.dim, piece.start, piece.stop - piece.start).copy_(region)
                full = target.shape
                sums[piece.part] += checksum(region, full, dim=piece.dim, start=piece.start)
        for part, made, total in zip(parts, found, sums, strict=True):
            assert torch.equal(part, made), rule
            assert (total - checksum(part)) % 2**64 == 0, rule


@pytest.mark.parametrize("vocabulary", [101, 256])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["qwen2", "qwen3_moe"])
def test_even_slices_are_what_ranks_hold(vocabulary: int, changes: dict[str, Any]) -> None:
    """For nccl_m2n: torch.chunk of the full tensor, or all of it on every rank."""
    shape, size = shape_of(**changes, vocab_size=vocabulary), 2
    dims = {}
    for rule in rules_of(shape):
        for part, full in enumerate(full_tensors(rule, shape)):
            dim = dims[rule.hf[part]] = even_dim(rule, shape, part, size=size)
            assert even_dim(rule, shape, part, size=1) is None
            if dim is None:
                continue
            whole = merge(rule, full_tensors(rule, shape), shape)
            for rank, expected in enumerate(torch.chunk(full, size, dim=dim)):
                shard = cut(rule, whole, shape, rank=rank, size=size)
                pieces = pieces_of(rule, shape, rank=rank, size=size)
                (piece,) = (piece for piece in pieces if piece.part == part)
                assert torch.equal(region_of(shard, piece), expected), rule
    layer = "model.layers.0."
    assert dims["model.embed_tokens.weight"] == (0 if vocabulary == 256 else None)
    assert dims[layer + "input_layernorm.weight"] is None
    assert [dims[f"{layer}self_attn.{x}_proj.weight"] for x in "qkvo"] == [0, 0, 0, 1]
    mlp = "mlp.experts.3." if changes else "mlp."
    found = [dims[f"{layer}{mlp}{x}_proj.weight"] for x in ("gate", "up", "down")]
    assert found == [0, 0, 1]


def test_a_number_of_ranks_that_kv_heads_do_not_fit_is_refused() -> None:
    shape = shape_of()
    rule = next(rule for rule in rules_of(shape) if rule.kind == "qkv")
    with pytest.raises(
        ValueError, match=r"parallel\.tensor: found 3, .* num_key_value_heads \(2\)"
    ):
        pieces_of(rule, shape, rank=0, size=3)
    with pytest.raises(ValueError, match=r"parallel\.tensor: found 3, .* 256 rows"):
        pieces_of(rule, shape_of(**ONE_KV_HEAD), rank=0, size=3)


def holders(shape: ModelShape, *, tensor: int, pipeline: int, data: int) -> list[Holder]:
    """Ranks as Megatron numbers them: tensor fastest, then data, then pipeline."""
    names = [rule.megatron for rule in rules_of(shape)]
    stages = []
    for stage in range(pipeline):
        layers = range(
            stage * shape.num_layers // pipeline, (stage + 1) * shape.num_layers // pipeline
        )
        held = {n for n in names if any(f"layers.{layer}." in n for layer in layers)}
        held |= {n for n in names if stage == 0 and n.startswith("embedding")}
        last = stage == pipeline - 1
        held |= {n for n in names if last and n.startswith(("decoder.final", "output"))}
        stages.append(frozenset(held))
    return [
        Holder(rank=(s * data + d) * tensor + t, tensor=(t, tensor), expert_tensor=(t, tensor),
               names=stages[s])
        for s in range(pipeline)
        for d in range(data)
        for t in range(tensor)
    ]  # fmt: skip


def model_bytes(shape: ModelShape, itemsize: int) -> int:
    return itemsize * sum(
        math.prod(size) for rule in rules_of(shape) for size in hf_shapes(rule, shape)
    )


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("data", [1, 2, 3])
def test_every_byte_leaves_the_trainer_once(tensor: int, pipeline: int, data: int) -> None:
    shape = shape_of()
    ranks = holders(shape, tensor=tensor, pipeline=pipeline, data=data)
    plan = plan_refit(rules_of(shape), shape, ranks, dtype=torch.bfloat16)
    assert plan.total_bytes == model_bytes(shape, 2)
    by_rank = plan.bytes_by_rank()
    assert sum(by_rank.values()) == plan.total_bytes
    assert set(by_rank) == {holder.rank for holder in ranks}  # copies share the work
    names = [rule.megatron for rule in rules_of(shape)]
    held = {holder.rank: holder.names for holder in ranks}
    assert all(names[take.rule] in held[take.rank] for take in plan.takes)
    tensors = [take.tensor for take in plan.takes]
    assert tensors == sorted(tensors) and set(tensors) == set(range(max(tensors) + 1))
    assert plan == plan_refit(rules_of(shape), shape, ranks, dtype=torch.bfloat16)


def test_the_bytes_of_a_small_model() -> None:
    """Written out: hidden 192, 6:2 heads of 32, ffn 384, 4 layers, 101 words, tied, TP 2 x PP 2."""
    shape = shape_of()
    plan = plan_refit(
        rules_of(shape), shape, holders(shape, tensor=2, pipeline=2, data=1), dtype=torch.float32
    )
    qkv, biases, proj, mlp = (192 + 64 + 64) * 192, 192 + 64 + 64, 192 * 192, 3 * 384 * 192
    cut_layer, norms = (qkv + biases + proj + mlp) // 2, 2 * 192
    layers = 2 * cut_layer
    assert plan.bytes_by_rank() == {
        0: 4 * (layers + 2 * norms + 51 * 192) - 4 * 192 * taken_by_rank_1(plan, 0, 1),
        1: 4 * (layers + 50 * 192) + 4 * 192 * taken_by_rank_1(plan, 0, 1),
        2: 4 * (layers + 2 * norms + 192) - 4 * 192 * taken_by_rank_1(plan, 2, 3),
        3: 4 * layers + 4 * 192 * taken_by_rank_1(plan, 2, 3),
    }
    assert plan.total_bytes == model_bytes(shape, 4)


def taken_by_rank_1(plan: Any, first: int, second: int) -> int:
    """Norms (192 elements, on both ranks of a tensor-parallel group) that the second one gives."""
    return sum(take.num_bytes == 4 * 192 and take.rank == second for take in plan.takes)


def test_a_missing_holder_is_named() -> None:
    shape = shape_of()
    ranks = holders(shape, tensor=2, pipeline=2, data=1)
    with pytest.raises(RuntimeError, match=r"word_embeddings\.weight, or only some"):
        plan_refit(rules_of(shape), shape, ranks[1:], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"layers\.2\."):
        plan_refit(rules_of(shape), shape, ranks[:2], dtype=torch.bfloat16)


def test_streams_send_every_tensor_once_in_equal_rounds() -> None:
    leaders = [0, 0, 4, 4, 0, 4, 0]
    sizes = [30, 30, 40, 10, 90, 5, 5]  # 90 is more than a share: alone in its round
    streams = plan_streams(leaders, sizes, 120)
    assert [stream.leader for stream in streams] == [0, 4]
    assert streams[0].rounds == ((0, 1), (4,), (6,))
    assert streams[1].rounds == ((2, 3, 5), (), ())
    for number in range(3):
        at_once = sum(sizes[i] for stream in streams for i in stream.rounds[number])
        assert at_once <= 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_notices_changes_and_swaps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 70, generator=generator).to(dtype)
    sound = checksum(tensor)
    assert sound == checksum(tensor.clone()) and -(2**63) <= sound < 2**63
    for row, column in ((0, 0), (299, 69), (150, 3)):
        changed = tensor.clone()
        changed[row, column] += 0.5
        assert checksum(changed) != sound
    swapped = tensor.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksum(swapped) != sound
    assert checksum(tensor.t().contiguous()) != sound
    assert checksum(torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_a_checksum_does_not_depend_on_the_blocks_it_is_made_in(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors take several: swapped rows of two of them show as those of one do."""
    tensor = torch.arange(60, dtype=torch.int16).view(3, 10, 2)
    swapped = tensor.clone()
    swapped[:, [0, 9]] = swapped[:, [9, 0]]
    expected = [checksum(tensor, dim=1), checksum(swapped, dim=1)]
    monkeypatch.setattr(checksums, "_ELEMENTS_AT_A_TIME", size)
    found = [checksum(tensor, dim=1), checksum(swapped, dim=1)]
    assert found == expected and found[0] != found[1]


def test_a_checksum_of_more_than_one_real_block() -> None:
    """Its value is the definition's, by Python's integers."""
    rows = checksums._ELEMENTS_AT_A_TIME // 1024 + 1
    tensor = torch.zeros(rows, 1024, dtype=torch.uint8)
    tensor[0, 5], tensor[-1, 3] = 7, 9
    index = torch.tensor([5, (rows - 1) * 1024 + 3])
    factors = [int(factor) for factor in checksums._mix(index)]
    total = checksums.signed(7 * factors[0] + 9 * factors[1])
    assert checksum(tensor) == total
