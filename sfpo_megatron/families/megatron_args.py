"""A model and its layout as Megatron-LM's command line names them, for the checkpoints it reads."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.shape import ModelShape


def megatron_lm_args(shape: ModelShape, parallel: ParallelConfig, *, dtype: str) -> Namespace:
    """What its loader compares with its command line (check_checkpoint_args), or takes over with
    --use-checkpoint-args."""
    moe, rope = shape.moe, shape.rope_scaling
    return Namespace(
        **{"rotary_base": shape.rope_base, **latent_fields(shape)},
        **{"moe_router_topk": 2, "moe_router_pre_softmax": False, **router_fields(shape)},
        ckpt_format="torch_dist",
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_kv_heads != shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_position,
        seq_length=shape.max_position,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size(parallel.tensor),
        make_vocab_size_divisible_by=1,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rope_scaling=rope is not None and rope.kind == "llama3",
        rope_scaling_factor=rope.factor if rope else 8.0,
        window_size=(shape.window - 1, 0) if shape.window else None,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        swiglu=True,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        # Else --use-checkpoint-args leaves Megatron-LM's own, 0.1.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        num_experts=moe.num_experts if moe else None,
        moe_ffn_hidden_size=moe.ffn_size if moe else None,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        params_dtype=dtype,
        use_distributed_optimizer=True,
        optimizer="adam",
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        data_parallel_random_init=False,
        phase_transition_iterations=None,
    )


def latent_fields(shape: ModelShape) -> dict[str, Any]:
    """Settings of multi-head latent attention, as MLATransformerConfig and the command line name
    them; none without it."""
    mla, rope = shape.mla, shape.rope_scaling
    if mla is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.query_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rope_type": "yarn" if rope else "rope",
        "rotary_base": shape.rope_base,
        "rotary_scaling_factor": rope.factor if rope else 1.0,
        "original_max_position_embeddings": (
            rope.original_max_position if rope else shape.max_position
        ),
        "beta_fast": rope.beta_fast if rope else 32.0,
        "beta_slow": rope.beta_slow if rope else 1.0,
        "mscale": rope.mscale if rope else 1.0,
        "mscale_all_dim": rope.mscale_all_dim if rope else 0.0,
    }


def router_fields(shape: ModelShape) -> dict[str, Any]:
    """Settings of the choice of experts, as TransformerConfig and the command line name them.

    transformers takes the softmax over all experts, then the top k, then divides by their sum
    (`normalize_topk`). The softmax over the top k's logits alone (Megatron's default) is the same
    number; without the division it is Megatron's `moe_router_pre_softmax`.
    """
    moe = shape.moe
    if moe is None:
        return {}
    fields: dict[str, Any] = {"moe_router_topk": moe.experts_per_token}
    if not moe.biased_sigmoid:
        softmax = {"moe_router_score_function": "softmax"}
        return fields | softmax | {"moe_router_pre_softmax": not moe.normalize_topk}
    dense, limited = moe.num_dense_layers, moe.groups_per_token < moe.num_groups
    if dense:
        fields["moe_layer_freq"] = [0] * dense + [1] * (shape.num_layers - dense)
    return fields | {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",  # so do transformers and DeepSeek's own code
        "moe_router_enable_expert_bias": True,
        # SFPO cannot put a buffer back, so the bias stays as the model has it.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_num_groups": moe.num_groups if limited else None,
        "moe_router_group_topk": moe.groups_per_token if limited else None,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size,
    }
