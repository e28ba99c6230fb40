"""Qwen3-MoE (Qwen3-30B-A3B): Qwen3's attention, and experts in every layer."""

from sfpo_megatron.families import llama, qwen3
from sfpo_megatron.families.experts import moe_rules

LAYER = (
    *llama.ATTENTION,
    *qwen3.QK_NORMS,
    *moe_rules(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
