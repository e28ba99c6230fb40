"""Mistral: Llama's layer, every one with a sliding window."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    layer=llama.LAYER,
    windowed=windows.every_layer,
    defaults={
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    nullable=frozenset(("head_dim", "sliding_window")),
)
