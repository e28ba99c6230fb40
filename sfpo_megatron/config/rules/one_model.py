"""Settings of Megatron's layers that the model and the engines do not have: trained with them, the
policy would be another one than generates, is exported and was read. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape

AS_IN_THE_MODEL: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "qk_clip": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "no_rope_freq": None,
    "mrope_section": None,
    "mtp_num_layers": None,
    "use_mup": False,  # from megatron-core 0.19 on, as those below that are marked
    "moe_expert_rank_capacity_factor": None,  # 0.19
    "moe_input_jitter_eps": None,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,  # 0.19
    "moe_router_force_biased": None,  # 0.19
    "moe_router_force_load_balancing": False,
    "moe_router_topk_limited_devices": None,
    "moe_shared_expert_gate": False,
    "moe_shared_expert_glu_interleave_size": None,  # 0.19
    "moe_token_dropping": False,
}
"""Field of TransformerConfig -> the value that all models here have."""


def one_model(config: RunConfig) -> Iterator[Problem]:
    """Whether `megatron.transformer` makes another function of the same weights."""
    for name, value in config.megatron.transformer.items():
        if name in AS_IN_THE_MODEL and value != AS_IN_THE_MODEL[name]:
            yield Problem(
                f"megatron.transformer.{name}",
                repr(value),
                f"{AS_IN_THE_MODEL[name]!r}, as in the model and its engines",
                "remove it: the policy that is trained would not be the one that generates",
            )


def fused_rope(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """A rule like `MODEL_RULES`: TransformerEngine's kernel for packed sequences does not multiply
    by the attention factor of stretched embeddings, and Megatron, which else turns to its own, does
    not say so of packs (`apply_rotary_pos_emb`, rope_utils.py). Latent attention has it in its
    cosines and sines."""
    factor = shape.rope_scaling.attention_factor if shape.rope_scaling else 1.0
    if config.megatron.transformer.get("apply_rope_fusion") and shape.mla is None and factor != 1:
        yield Problem(
            "megatron.transformer.apply_rope_fusion",
            f"true with a model of attention factor {factor:.4g}",
            "false: the fused kernel leaves the factor out",
            "remove it: it is set where the model allows it",
        )
