"""Mixtral: Llama's attention, and experts in every layer (w1 gate, w3 up, w2 down)."""

from functools import partial

from sfpo_megatron.families import windows
from sfpo_megatron.families.experts import moe_rules
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama
from sfpo_megatron.families.moe import routed_experts

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    layer=(*llama.ATTENTION, *moe_rules(block="block_sparse_moe", gate="w1", up="w3", down="w2")),
    windowed=windows.every_layer,
    moe=partial(routed_experts, size="intermediate_size", normalized=True),
)
