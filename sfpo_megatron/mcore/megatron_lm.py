"""What Megatron-LM's own loader looks for in a torch_dist checkpoint, beside the tensors.

Its training/checkpointing.py reads `args` (compared with its command line by check_checkpoint_args,
or taken over with --use-checkpoint-args), `iteration`, `checkpoint_version` and `rng_state`.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.mcore.setup import Policy


def megatron_lm_args(shape: ModelShape, parallel: ParallelConfig, *, dtype: str) -> Namespace:
    """Megatron-LM's command line for this model, under the names of its argument parser."""
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
        position_embedding_type="rope",
        add_position_embedding=False,
        rotary_base=shape.rope_base,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        swiglu=True,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        num_experts=shape.moe.num_experts if shape.moe else None,
        moe_router_topk=shape.moe.experts_per_token if shape.moe else 2,
        moe_ffn_hidden_size=shape.moe.ffn_size if shape.moe else None,
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


def megatron_lm_extras(policy: Policy, step: int) -> dict[str, Any]:
    """`args` and `rng_state`, as Megatron-LM's generate_state_dict and get_rng_state make them."""
    config = policy.config
    arguments = megatron_lm_args(policy.shape, config.parallel, dtype=config.model.dtype)
    arguments.iteration = step
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    rng_state = ShardedObject(
        "rng_state",
        [state],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {"args": arguments, "rng_state": rng_state, "num_floating_point_operations_so_far": 0}
