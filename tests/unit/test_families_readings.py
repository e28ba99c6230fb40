"""A config.json means here what the installed transformers makes of it, key by key, or is refused.

Not exercised: that Megatron computes with these sizes (tests/dist/test_logits.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made.readings import FULL, auto_config, same, same_or_refused

from sfpo_megatron.families.keys import KINDS, REQUIRED
from sfpo_megatron.families.known import FAMILIES
from sfpo_megatron.families.shape import UnsupportedModel, model_shape

ARCHITECTURE = ("architectures", "model_type")
MUST_BE_SAID = ("scoring_func", "topk_method")
"""DeepSeek-V3's: vLLM takes others where they are not there."""


def test_every_family_is_here() -> None:
    assert sorted(FULL) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FULL)
def test_all_keys(tmp_path: Path, family: str) -> None:
    same(tmp_path, FULL[family])


@pytest.mark.parametrize("family", FULL)
def test_each_key_left_out(tmp_path: Path, family: str) -> None:
    """The architecture's own default. Sizes that give other sizes are left out of a model whose
    other sizes go with the default."""
    taken = []
    for key in FULL[family]:
        if key in ARCHITECTURE:
            continue
        config = {name: value for name, value in FULL[family].items() if name != key}
        if key in REQUIRED:
            with pytest.raises(UnsupportedModel, match=f"{key} = None"):
                model_shape(config)
        elif key == "num_key_value_heads":
            default = FAMILIES[family].defaults.get(key) or 6
            config |= {"num_attention_heads": default, "hidden_size": 16 * default}
            same(tmp_path, config)
            taken.append(key)
        elif key not in MUST_BE_SAID:
            same(tmp_path, config | FITTING.get(family, {}).get(key, {}))
            taken.append(key)
    assert {"rope_theta", "rms_norm_eps", "num_key_value_heads", "intermediate_size"} < set(taken)
    assert {"max_position_embeddings", "tie_word_embeddings", "attention_bias"} < set(taken)


FITTING: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {"num_experts_per_tok": {"num_experts": 8}},
    "deepseek_v3": {
        "num_experts_per_tok": {"topk_group": 4},  # 8: two of each group
        "n_group": {"n_routed_experts": 16},  # 8 groups
        "topk_group": {"num_experts_per_tok": 4, "n_group": 4},
        "first_k_dense_replace": {"num_hidden_layers": 4},
    },
}


@pytest.mark.parametrize("family", FULL)
def test_each_key_null(tmp_path: Path, family: str) -> None:
    """What transformers refuses is refused by name; what it takes is taken for the same, but for
    what its model then cannot compute with."""
    for key in FULL[family]:
        if key in ARCHITECTURE:
            continue
        config = FULL[family] | {key: None}
        try:
            reference = auto_config(tmp_path, config)
        except Exception:
            with pytest.raises(UnsupportedModel, match=f"{key} = None"):
                model_shape(config)
            continue
        if same_or_refused(tmp_path, config):
            continue
        assert (family, key) in NOT_COMPUTED or key == "rope_theta", (key, reference)


_OF_DEEPSEEK = (
    *("num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "v_head_dim"),
    *("norm_topk_prob", "rope_interleave", "scoring_func", "topk_method", "moe_layer_freq"),
)
NOT_COMPUTED = [("qwen3_moe", "head_dim"), *(("deepseek_v3", key) for key in _OF_DEEPSEEK)]
"""Keys that its configuration lets be null and its model, or Megatron, cannot do without."""


@pytest.mark.parametrize("family", FULL)
def test_values_of_another_kind(tmp_path: Path, family: str) -> None:
    """ "64", 64.0, true, -1, 0, a list, an object where a number belongs, and so on, key by key:
    taken only where transformers takes them, and for the same."""
    refused = 0
    for key, value in FULL[family].items():
        if key in ARCHITECTURE:
            continue
        others: list[Any] = [str(value), True, -1, 0, [value], {"a": value}, float("nan"), 1, 1e400]
        if isinstance(value, int | float):
            others += [float(value), int(value)]
        for other in others:
            refused += not same_or_refused(tmp_path, FULL[family] | {key: other})
    sizes = [key for key in FULL[family] if KINDS.get(key, ("",))[0] == "a positive integer"]
    assert refused >= 6 * len(sizes)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", ["64", 64.0, True, -64, 0, [64], None])
def test_a_size_of_another_kind_is_named(key: str, value: object) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        model_shape(FULL["llama"] | {key: value})
    assert (caught.value.found, caught.value.expected) == (
        f"{key} = {value!r}",
        "a positive integer",
    )


ALIASES = [
    ("mixtral", "num_experts", "num_local_experts"),
    ("qwen3_moe", "num_local_experts", "num_experts"),
    ("deepseek_v3", "num_local_experts", "n_routed_experts"),
    ("deepseek_v3", "num_mtp_layers", "num_nextn_predict_layers"),
]


@pytest.mark.parametrize(("family", "other", "key"), ALIASES)
def test_two_names_of_one_key(tmp_path: Path, family: str, other: str, key: str) -> None:
    """Either is read as transformers reads it, both if they say the same."""
    value = FULL[family][key] * 2 or 1
    config = {name: found for name, found in FULL[family].items() if name != key}
    same(tmp_path, config | {other: value})
    same(tmp_path, config | {other: value, key: value})
    with pytest.raises(UnsupportedModel, match=f"{key} {value * 2} and {other} {value}"):
        model_shape(config | {other: value, key: value * 2})


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("llama", {"num_key_value_heads": 4}, "num_attention_heads 6 with num_key_value_heads 4"),
        ("qwen2", {"num_key_value_heads": 12}, "6 with num_key_value_heads 12"),
        ("llama", {"head_dim": 15}, "head_dim 15, expected an even number"),
        ("qwen3", {"head_dim": None}, "head_dim = None"),
        ("llama", {"hidden_size": 50}, "hidden_size 50 with 6 heads, expected a multiple"),
        ("mistral", {"hidden_size": 50, "head_dim": None}, "50 with 6 heads, expected a whole"),
        ("llama", {"model_type": "qwen2"}, "model_type 'qwen2' with architecture LlamaForCausal"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types = 'full_attention'"),
        ("llama", {"compression_config": {}}, "compression_config, expected unquantized"),
        ("llama", {"quantization_config": {}}, "quantization_config, expected unquantized"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
        ("llama", {"rms_norm_eps": 1}, "rms_norm_eps = 1, expected a finite number with a point"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps = inf"),
        ("llama", {"dtype": "int8"}, "dtype = 'int8'"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id = '2'"),
        ("llama", {"architectures": ["OwnForCausalLM"]}, "architecture OwnForCausalLM"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architecture None"),
    ],
)
def test_what_goes_with_nothing(family: str, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        model_shape(FULL[family] | change)
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1
