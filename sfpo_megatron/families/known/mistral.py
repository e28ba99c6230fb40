"""Mistral: Llama's layer, every one with a sliding window."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    layer=llama.LAYER,
    windowed=windows.every_layer,
)
