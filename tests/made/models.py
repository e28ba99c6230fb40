"""Models as their config.json says: those that `check` is shown, and one of each family.

No torch: tests/conftest.py imports it before any test does.
"""

from __future__ import annotations

from typing import Any

from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.shape import model_shape

TOKENIZER_JSON = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
"""Text of the smallest tokenizer.json."""
MODEL_JSON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 101,
}
"""What the fixture `model_dir` writes."""

# Changes to MODEL_JSON.
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LATENT: dict[str, Any] = {
    "tie_word_embeddings": False,
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "q_lora_rank": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

TINY: dict[str, Any] = {
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
"""A smaller one, whose sizes are all different."""
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    },
    "MixtralForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 4,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 20,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "q_lora_rank": 12,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}
"""Changes to TINY, by architecture."""
UNTIED = [("DeepseekV3ForCausalLM", True)]
"""Refused: vLLM would leave the head unset."""
SHAPES = [
    model_shape(
        {**TINY, **OF_EXPERTS.get(name, {}), "architectures": [name], "tie_word_embeddings": tied}
    )
    for name in SUPPORTED_ARCHITECTURES
    for tied in (True, False)
    if (name, tied) not in UNTIED
]
"""TINY in every family, tied and untied."""
IDS = [f"{s.family}-{'tied' if s.tied_embeddings else 'untied'}" for s in SHAPES]
