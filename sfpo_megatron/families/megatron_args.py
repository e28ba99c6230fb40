"""A model and its layout as Megatron-LM's command line names them, for the checkpoints it reads."""

from __future__ import annotations

from argparse import Namespace

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.shape import ModelShape


def megatron_lm_args(shape: ModelShape, parallel: ParallelConfig, *, dtype: str) -> Namespace:
    """What its loader compares with its command line (check_checkpoint_args), or takes over with
    --use-checkpoint-args."""
    moe, rope = shape.moe, shape.rope_scaling
    return Namespace(
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
        rotary_base=shape.rope_base,
        use_rope_scaling=rope is not None and rope.kind == "llama3",
        rope_scaling_factor=rope.factor if rope else 8.0,
        window_size=(shape.window - 1, 0) if shape.window else None,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        swiglu=True,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        num_experts=moe.num_experts if moe else None,
        moe_router_topk=moe.experts_per_token if moe else 2,
        moe_router_pre_softmax=bool(moe and not moe.normalize_topk),
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
