"""Qwen3-MoE (Qwen3-30B-A3B): Qwen3's attention, and experts in every layer."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.experts import moe_rules
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama, qwen3
from sfpo_megatron.families.moe import routed_experts

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    layer=(
        *llama.ATTENTION,
        *qwen3.QK_NORMS,
        *moe_rules(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    windowed=windows.every_layer_if_used,
    moe=routed_experts,
)
