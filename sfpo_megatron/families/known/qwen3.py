"""Qwen3: Llama's layer plus RMSNorm on each head's query and key."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama, qwen2
from sfpo_megatron.families.rule import Rule

QK_NORMS = tuple(
    Rule(
        megatron=f"decoder.layers.{{layer}}.self_attention.{x}_layernorm.weight",
        hf=(f"model.layers.{{layer}}.self_attn.{x}_norm.weight",),
    )
    for x in "qk"
)

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    layer=(*llama.LAYER, *QK_NORMS),
    windowed=windows.last_layers_if_used,
    defaults={**qwen2.DEFAULTS, "attention_bias": False, "head_dim": 128},
    nullable=qwen2.NULLABLE,
)
