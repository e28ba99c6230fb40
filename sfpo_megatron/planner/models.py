"""Shapes of the models whose runs have published times, or that docs/scaling.md shows. No torch."""

from __future__ import annotations

from sfpo_megatron.families.shape import ModelShape, model_shape


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, *, head_dim: int = 128, tied: bool = False
) -> ModelShape:
    return model_shape(
        {
            "architectures": ["LlamaForCausalLM"],
            "head_dim": head_dim,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "tie_word_embeddings": tied,
            "vocab_size": 128256,
        }
    )


def _qwen2(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, *, tied: bool
) -> ModelShape:
    return model_shape(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
            "vocab_size": vocab,
        }
    )


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> ModelShape:
    return model_shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 128,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "tie_word_embeddings": tied,
            "vocab_size": 151936,
        }
    )


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int) -> ModelShape:
    return model_shape(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": 128,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "moe_intermediate_size": ffn,
            "norm_topk_prob": True,
            "num_attention_heads": heads,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": layers,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        }
    )


LLAMA_1B = _llama(16, 2048, 8192, 32, head_dim=64, tied=True)
LLAMA_8B = _llama(32, 4096, 14336, 32)
LLAMA_70B = _llama(80, 8192, 28672, 64)
QWEN2_5_1_5B = _qwen2(28, 1536, 8960, 12, 2, 151936, tied=True)
QWEN2_5_3B = _qwen2(36, 2048, 11008, 16, 2, 151936, tied=True)
QWEN2_5_7B = _qwen2(28, 3584, 18944, 28, 4, 152064, tied=False)
"""DeepSeek-R1-Distill-Qwen-7B too."""
DISTILL_1_5B = _qwen2(28, 1536, 8960, 12, 2, 151936, tied=False)
"""DeepSeek-R1-Distill-Qwen-1.5B."""
QWEN3_0_6B = _qwen3(28, 1024, 3072, 16, tied=True)
QWEN3_4B = _qwen3(36, 2560, 9728, 32, tied=True)
QWEN3_32B = _qwen3(64, 5120, 25600, 64, tied=False)
QWEN3_30B_A3B = _qwen3_moe(48, 2048, 768, 32)
QWEN3_235B_A22B = _qwen3_moe(94, 4096, 1536, 64)
DEEPSEEK_671B = model_shape(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
)
MOONLIGHT_16B = model_shape(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
)
