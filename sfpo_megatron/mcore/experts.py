"""Mixture of experts under Megatron: TransformerConfig fields, and names with global indices."""

from __future__ import annotations

import re
from typing import Any

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.mcore.capabilities import Capabilities

_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc\d)\.weight(\d+)")


def expert_fields(
    shape: ModelShape, parallel: ParallelConfig, capabilities: Capabilities
) -> dict[str, Any]:
    """TransformerConfig fields of the experts; none for a dense model.

    transformers takes the softmax over all experts, then the top k, then divides by their sum
    (`normalize_topk`). The softmax over the top k's logits alone (Megatron's default) is the same
    number; without the division it is Megatron's `moe_router_pre_softmax`.
    """
    moe = shape.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.experts_per_token,
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not moe.normalize_topk,
        # Megatron's default would add its load-balancing loss; here the objective is the user's.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": moe.aux_loss_coef,
        "moe_grouped_gemm": capabilities.cuda and capabilities.layers == "te",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def canonical_name(name: str, mlp: Any) -> str:
    """A layer's param `name`, with the global index if it is an expert's (families/experts.py).

    `mlp`: the layer's MoE layer, or its dense MLP, which has no such params.
    """
    if match := _SEQUENTIAL.fullmatch(name):
        local, linear = match.groups()
    elif match := _GROUPED.fullmatch(name):
        linear, local = match.groups()
    else:
        return name
    return f"mlp.experts.experts.{mlp.local_expert_indices[int(local)]}.{linear}.weight"
