"""Mixtral: Llama's attention, and experts in every layer (w1 gate, w3 up, w2 down)."""

from sfpo_megatron.families import llama
from sfpo_megatron.families.experts import moe_rules

LAYER = (*llama.ATTENTION, *moe_rules(block="block_sparse_moe", gate="w1", up="w3", down="w2"))
