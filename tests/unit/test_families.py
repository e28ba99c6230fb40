"""Family tables: merge and split, cut and join, against Megatron's documented layouts written out.

Not exercised here: the models themselves (tests/dist/test_logits.py).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from made.models import IDS, OF_EXPERTS, SHAPES, TINY
from made.readings import apart
from torch import Tensor

from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.operations import cut, join, merge, split
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape, model_shape
from sfpo_megatron.families.table import hf_shapes, rule_by_name, rules_of

QWEN2 = next(shape for shape in SHAPES if shape.family == "qwen2")


def parts_of(rule: Rule, shape: ModelShape, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random) for size in hf_shapes(rule, shape)]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("size", [1, 2])
def test_round_trip_through_megatron_shards(shape: ModelShape, size: int) -> None:
    """HF parts -> whole -> shards -> whole -> HF parts, bit for bit; shards have equal shapes."""
    for rule in rules_of(shape):
        parts = parts_of(rule, shape)
        whole = merge(rule, parts, shape)
        shards = [cut(rule, whole, shape, rank=rank, size=size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        if rule.tp_dim is not None:
            assert shards[0].numel() * size >= whole.numel()
        back = split(rule, join(rule, shards), shape)
        assert len(back) == len(parts)
        for got, wanted in zip(back, parts, strict=True):
            assert torch.equal(got, wanted), rule.megatron


def test_qkv_is_laid_out_by_kv_group() -> None:
    """Group g: its heads_per_group query heads, then its key head, then its value head, each of
    head_dim rows (SelfAttention.get_query_key_value_tensors). Written out with labels."""
    shape = model_shape(TINY)  # qwen2: 6 query heads, 2 groups, head_dim 4, biases
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    (rule,) = [rule for rule in rules_of(shape) if rule.megatron == name]
    # Row label: 100 * kind (q 1, k 2, v 3) + 10 * head + row in the head.
    q, k, v = (
        torch.tensor([100.0 * kind + 10 * h + d for h in range(heads) for d in range(4)])
        for kind, heads in ((1, 6), (2, 2), (3, 2))
    )
    expected = []
    for group in range(2):
        heads = [(1, 3 * group), (1, 3 * group + 1), (1, 3 * group + 2), (2, group), (3, group)]
        expected += [100.0 * kind + 10 * h + d for kind, h in heads for d in range(4)]
    whole = merge(rule, [q, k, v], shape)
    assert whole.tolist() == expected
    # A tensor-parallel rank holds whole groups.
    assert cut(rule, whole, shape, rank=1, size=2).tolist() == expected[20:]


def test_gate_and_up_are_stacked_on_each_rank() -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    (rule,) = [rule for rule in rules_of(QWEN2) if rule.megatron == name]
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    whole = merge(rule, [gate, up], QWEN2)
    shards = [cut(rule, whole, QWEN2, rank=rank, size=2) for rank in range(2)]
    assert [s.flatten().tolist() for s in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_vocabulary_is_padded_with_zeros_and_cut_again() -> None:
    shape = QWEN2
    rule = rules_of(shape)[0]
    whole = torch.ones(101, 48)
    shards = [cut(rule, whole, shape, rank=rank, size=2) for rank in range(2)]
    assert [tuple(s.shape) for s in shards] == [(51, 48), (51, 48)]
    assert not shards[1][-1].any() and shards[1][:-1].all()
    (back,) = split(rule, join(rule, shards), shape)
    assert torch.equal(back, whole)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_tables_name_every_tensor_once(shape: ModelShape) -> None:
    """Expected names from transformers' modules on the meta device: none missing, none more."""
    import transformers

    (architecture,) = [n for n, family in SUPPORTED_ARCHITECTURES.items() if family == shape.family]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(
        **{k: v for k, v in TINY.items() if k != "architectures"}
        | OF_EXPERTS.get(architecture, {})
        | {"tie_word_embeddings": shape.tied_embeddings}
    )
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if shape.tied_embeddings:
        del expected["lm_head.weight"]
    expected = dict(apart(expected, mixtral=shape.family == "mixtral"))
    rules = rules_of(shape)
    listed = [
        (name, size)
        for rule in rules
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    ]
    assert len({name for name, _ in listed}) == len(listed) and dict(listed) == expected
    assert len({rule.megatron for rule in rules}) == len(rules)
    output = rule_by_name(shape)["output_layer.weight"]
    tied_to = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    assert output.hf == (tied_to,)


def test_experts_carry_their_global_index() -> None:
    shape = model_shape(
        {**TINY, **OF_EXPERTS["MixtralForCausalLM"], "architectures": ["MixtralForCausalLM"]}
    )
    (rule,) = [
        rule
        for rule in rules_of(shape)
        if rule.megatron == "decoder.layers.2.mlp.experts.experts.1.linear_fc1.weight"
    ]
    expert = "model.layers.2.block_sparse_moe.experts.1."
    assert rule.hf == (expert + "w1.weight", expert + "w3.weight")  # gate, up
    assert rule.expert and rule.kind == "gate_up"


def test_shape_reads_both_names_of_the_number_of_experts() -> None:
    """transformers 5 saves Qwen3-MoE's `num_experts` as `num_local_experts`."""
    four = {**TINY, **OF_EXPERTS["Qwen3MoeForCausalLM"], "architectures": ["Qwen3MoeForCausalLM"]}
    five = {**four, "num_local_experts": four["num_experts"]}
    del five["num_experts"]
    assert model_shape(four) == model_shape(five)
    moe = model_shape(four).moe
    assert moe is not None and (moe.num_experts, moe.ffn_size) == (3, 20)
    assert not moe.normalize_topk  # transformers' default where norm_topk_prob is not given


def test_shape_reads_both_rope_spellings() -> None:
    five = {k: v for k, v in TINY.items() if k != "rope_theta"}
    five["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    assert model_shape(five) == model_shape(TINY)
    assert model_shape(TINY).rope_base == 500000.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": None}, "num_experts = None"),
        (
            {
                **OF_EXPERTS["Qwen3MoeForCausalLM"],
                "architectures": ["Qwen3MoeForCausalLM"],
                "decoder_sparse_step": 2,
            },
            "decoder_sparse_step 2",
        ),
        ({"architectures": None}, "architecture None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["full_attention"]}, "1 layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": None,
                }
            },
            "yarn without original_max",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 4096,
                    "mscale": 1.0,
                }
            },
            "mscale 1.0 of rope type yarn",
        ),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        model_shape({**TINY, **change})


LATENT = {
    **TINY,
    **OF_EXPERTS["DeepseekV3ForCausalLM"],
    "architectures": ["DeepseekV3ForCausalLM"],
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank = None"),
        ({"n_routed_experts": None}, "n_routed_experts = None"),
        ({"rope_interleave": False}, "rope_interleave false"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope type linear with multi"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale 1.0 and mscale_all_dim None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings true"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace 3"),
        ({"n_shared_experts": None}, "n_shared_experts = None"),
        ({"head_dim": 8}, "head_dim 8 with qk_rope_head_dim 4"),
        ({"qk_rope_head_dim": 5, "head_dim": 5}, "qk_rope_head_dim 5, expected an even number"),
        ({"scoring_func": None}, "scoring_func None, expected sigmoid"),
        ({"topk_method": "greedy"}, "topk_method greedy"),
        ({"norm_topk_prob": False}, "norm_topk_prob false"),
        ({"n_group": 4}, "n_group 4, topk_group 2 for 4 of 6 experts"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok 2 with topk_group 2"),
    ],
)
def test_what_latent_models_may_not_ask_for(change: dict[str, Any], expected: str) -> None:
    model_shape(LATENT)
    with pytest.raises(ValueError, match=expected):
        model_shape({**LATENT, **change})


def test_scales_of_yarn_with_latent_attention() -> None:
    """transformers: cosines and sines times the ratio of the two (1 where they are equal), or
    0.1 ln(factor) + 1 without them."""
    shape = model_shape({**LATENT, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}})
    assert shape.rope_scaling is not None and shape.rope_scaling.attention_factor == 1.0
    shape = model_shape({**LATENT, "rope_scaling": YARN})
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_attention_and_matrices_of_a_sequence_cost_the_same_at_break_even(
    shape: ModelShape,
) -> None:
    """Multiplications of n tokens: n for each element of a matrix they pass (of the experts, the
    chosen ones; the head once, tied or not; the router not counted); attention, pair by pair."""
    elements = 0.0
    for rule in rules_of(shape):
        for name, sizes in zip(rule.hf, hf_shapes(rule, shape), strict=True):
            if len(sizes) < 2 or "embed_tokens" in name or "lm_head" in name:
                continue
            if shape.moe and name.endswith("gate.weight"):
                continue
            chosen = shape.moe.experts_per_token / shape.moe.num_experts if shape.moe else 1.0
            elements += sizes[0] * sizes[1] * (chosen if ".experts." in name else 1.0)
    elements += shape.hidden_size * shape.vocab_size
    n = 1000 * round(shape.attention_break_even)
    pairs = n * n / 2  # of a query and a key not after it
    of_pair = shape.num_heads * (shape.head_dim + shape.value_dim)
    attention = shape.num_layers * pairs * of_pair
    assert attention / (n * elements) == pytest.approx(n / shape.attention_break_even)
