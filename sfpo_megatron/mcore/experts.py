"""Mixture of experts under Megatron: TransformerConfig fields, and names with global indices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.megatron_args import router_fields
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.device_choices import groups_experts

if TYPE_CHECKING:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_layer import MoELayer

_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc\d)\.weight(\d+)")


def expert_fields(
    shape: ModelShape, parallel: ParallelConfig, capabilities: Capabilities
) -> dict[str, Any]:
    """TransformerConfig fields of the experts; none for a dense model."""
    moe = shape.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        **router_fields(shape),
        "moe_ffn_hidden_size": moe.ffn_size,
        # Megatron's default would add its load-balancing loss; here the objective is the user's.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": moe.aux_loss_coef,
        "moe_grouped_gemm": groups_experts(capabilities),
        "moe_permute_fusion": groups_experts(capabilities),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def canonical_name(name: str, mlp: MLP | MoELayer) -> str:
    """The name of a layer's param; an expert's has its global index (families/experts.py).

    `mlp`: the layer's MoE layer, or its dense MLP, which has no such params.
    """
    if match := _SEQUENTIAL.fullmatch(name):
        local, linear = match.groups()
    elif match := _GROUPED.fullmatch(name):
        linear, local = match.groups()
    else:
        return name
    return f"mlp.experts.experts.{mlp.local_expert_indices[int(local)]}.{linear}.weight"


@contextmanager
def exact_choice_biases(chunk: torch.nn.Module) -> Iterator[None]:
    """Put back the biases that Float16Module rounds inside: engines choose experts by the exact
    ones, and the routers keep them in fp32 (`TopKRouter._maintain_float32_expert_bias`)."""
    exact = dict(choice_biases(chunk))
    yield
    for name, bias in choice_biases(chunk):  # other tensors than before
        bias.data = exact[name].data


def choice_biases(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and buffer of the bias by which each router of `module` chooses experts."""
    for name, part in module.named_modules():
        if isinstance(part, TopKRouter) and part.expert_bias is not None:
            yield f"{name}.expert_bias", part.expert_bias
