"""Qwen3: Llama's layer plus RMSNorm on each head's query and key."""

from sfpo_megatron.families import llama
from sfpo_megatron.families.rules import Rule

QK_NORMS = tuple(
    Rule(
        megatron=f"decoder.layers.{{layer}}.self_attention.{x}_layernorm.weight",
        hf=(f"model.layers.{{layer}}.self_attn.{x}_norm.weight",),
    )
    for x in "qk"
)

LAYER = (*llama.LAYER, *QK_NORMS)
