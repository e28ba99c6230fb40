"""What of a config.json vLLM takes for something else is refused by `check`, named; and the rest is
the same to it.

Not exercised: an engine that generates (tests/e2e).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made.readings import FULL, auto_config

from sfpo_megatron.families.shape import model_shape
from sfpo_megatron.families.vllm_reading import engine_differs
from sfpo_megatron.rollout.vllm_arguments import named_positions

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ALL_LAYERS = {"qwen2": {"max_window_layers": 0}, "qwen3": {"max_window_layers": 0}}
"""vLLM gives a window to all layers or to none."""
SLIDING, WHOLE = "sliding_attention", "full_attention"


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return FULL[family] | ALL_LAYERS.get(family, {}) | changes


def differences(config: dict[str, Any]) -> list[str]:
    return [found for found, _, _ in engine_differs(config, model_shape(config))]


@pytest.mark.parametrize("family", FULL)
def test_every_family_is_the_same_to_both(family: str) -> None:
    assert differences(config_of(family)) == []


DIFFERENT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no_type": ("llama", {"model_type": None}, "no model_type"),
    "window_of_llama": ("llama", {"sliding_window": 8}, "window of 8 tokens in 3 layers"),
    "window_of_latents": ("deepseek_v3", {"sliding_window": 8}, "in 3 layers for the engine and"),
    "last_layers": ("qwen2", {"max_window_layers": 2}, "in 3 layers for the engine and in 1 of 3"),
    "no_layer": ("qwen3", {"max_window_layers": 3}, "in 3 layers for the engine and in 0 of 3"),
    "typed": ("qwen2", {"layer_types": [SLIDING, WHOLE, WHOLE]}, "and in 1 of 3"),
    "typed_mistral": ("mistral", {"layer_types": [SLIDING, WHOLE, WHOLE]}, "in 1 layers for the"),
    "head_dim_of_qwen2": ("qwen2", {"head_dim": 16}, "head_dim 16, which vLLM's Qwen2"),
    "original": (
        "llama",
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
        "original_max_position_embeddings 32 beside the rotary embeddings' own 64",
    ),
    "bias": ("llama", {"bias": True}, "bias True"),
    "qkv_bias": ("mistral", {"qkv_bias": True}, "qkv_bias True"),
    "logit_scale": ("llama", {"logit_scale": 0.5}, "logit_scale 0.5"),
    "both_directions": ("qwen3", {"is_causal": False}, "is_causal False"),
    "norms": ("qwen2", {"qk_norm": True}, "qk_norm True"),
    "chunks": ("qwen2", {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
    "groups": ("llama", {"num_kv_heads": 6}, "num_kv_heads 6"),
    "older_partial": ("llama", {"rotary_pct": 0.5}, "rotary_pct 0.5"),
    "indexer": ("deepseek_v3", {"index_topk": 64}, "index_topk"),
    "text_length": ("llama", {"max_seq_len": "2048"}, "max_seq_len '2048'"),
    "scaled": ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_the_two_read_differently_is_named(name: str) -> None:
    family, change, expected = DIFFERENT[name]
    config = config_of(family, **change)
    if change.get("model_type", "") is None:
        del config["model_type"]
    found = differences(config)
    assert len(found) == 1 and expected in found[0]


def test_windows_that_both_read_the_same() -> None:
    assert differences(config_of("qwen2", layer_types=[SLIDING] * 3)) == []
    assert differences(config_of("mistral", layer_types=[SLIDING] * 3)) == []
    assert differences(config_of("qwen2", use_sliding_window=False)) == []
    assert differences(config_of("mistral", sliding_window=None, layer_types=[WHOLE] * 3)) == []


@pytest.mark.parametrize(
    ("form", "num_tokens", "expected"),
    [
        ({}, 64, {}),
        ({"rope_scaling": YARN}, 64, {}),
        ({"rope_scaling": YARN}, 65, {"max_position_embeddings": 256}),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256, {}),
        ({"rope_scaling": YARN, "max_position_embeddings": 256}, 256, {}),
    ],
)
def test_the_engine_is_told_how_far_positions_go(
    tmp_path: Path, form: dict[str, Any], num_tokens: int, expected: dict[str, int]
) -> None:
    config = config_of("llama", max_position_embeddings=64) | form
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert named_positions(str(tmp_path), num_tokens) == expected
    assert named_positions("a/hub-id", num_tokens) == {}


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 3e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "rope_scaling": YARN},
    {"rope_parameters": YARN, "rope_scaling": {}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 3e4},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
]


@pytest.mark.full
@pytest.mark.parametrize("family", FULL)
def test_vllm_resolves_rotary_embeddings_as_transformers_does(tmp_path: Path, family: str) -> None:
    from vllm.transformers_utils.config import get_config

    for form in ROPES:
        config = {k: v for k, v in config_of(family).items() if k != "rope_theta"} | form
        kind = form.get("rope_scaling", {}).get(
            "rope_type", form.get("rope_scaling", {}).get("type")
        )
        if family == "deepseek_v3" and kind in ("linear", "llama3"):
            continue  # refused
        assert differences(config) == []
        theirs = auto_config(tmp_path, config)
        engine = get_config(tmp_path, trust_remote_code=False)
        assert engine.rope_parameters == theirs.rope_parameters


@pytest.mark.full
@pytest.mark.parametrize("form", ["none", "yarn", "linear", "llama3"])
def test_vllm_takes_exactly_the_lengths_that_check_takes(tmp_path: Path, form: str) -> None:
    """64 positions, stretched by 4: 256 are taken, 257 are not."""
    from vllm.config import ModelConfig

    change = {
        "none": ROPES[0],
        "yarn": {"rope_scaling": YARN},
        "linear": ROPES[6],
        "llama3": ROPES[7],
    }
    config = config_of("llama", max_position_embeddings=64, head_dim=32) | change[form]
    (tmp_path / "config.json").write_text(json.dumps(config))
    longest = model_shape(config).max_context
    assert longest == (64 if form == "none" else 256)

    def take(num_tokens: int) -> int:
        return ModelConfig(
            model=str(tmp_path),
            max_model_len=num_tokens,
            skip_tokenizer_init=True,
            dtype="float32",
            hf_overrides=named_positions(str(tmp_path), num_tokens),
        ).max_model_len

    assert take(longest) == longest
    with pytest.raises(ValueError, match="max_model_len"):
        take(longest + 1)
