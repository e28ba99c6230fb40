"""Family tables: merge and split, cut and join, against Megatron's documented layouts written out.

Not exercised here: the models themselves (tests/dist/test_logits.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfpo_megatron.families.rules import Rule, cut, hf_shapes, join, merge, split
from sfpo_megatron.families.shape import SUPPORTED_ARCHITECTURES, ModelShape, model_shape
from sfpo_megatron.families.table import rule_by_name, rules_of

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 101,
}
SHAPES = [
    model_shape({**CONFIG, "architectures": [name], "tie_word_embeddings": tied})
    for name in SUPPORTED_ARCHITECTURES
    for tied in (True, False)
]
IDS = [f"{s.family}-{'tied' if s.tied_embeddings else 'untied'}" for s in SHAPES]


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
    shape = model_shape(CONFIG)  # qwen2: 6 query heads, 2 groups, head_dim 4, biases
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
    (rule,) = [rule for rule in rules_of(SHAPES[0]) if rule.megatron == name]
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    whole = merge(rule, [gate, up], SHAPES[0])
    shards = [cut(rule, whole, SHAPES[0], rank=rank, size=2) for rank in range(2)]
    assert [s.flatten().tolist() for s in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_vocabulary_is_padded_with_zeros_and_cut_again() -> None:
    shape = SHAPES[0]
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

    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[shape.family]
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in CONFIG.items() if k != "architectures"}
        | {"tie_word_embeddings": shape.tied_embeddings}
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
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


def test_shape_reads_both_rope_spellings() -> None:
    five = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    five["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    assert model_shape(five) == model_shape(CONFIG)
    assert model_shape(CONFIG).rope_base == 500000.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "none"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        model_shape({**CONFIG, **change})
