"""Qwen2, Qwen2.5, Qwen2.5-Math, R1-Distill-Qwen: Llama's layer plus biases on q, k and v."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama
from sfpo_megatron.families.rule import Rule

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    layer=(
        *llama.LAYER,
        Rule(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.bias",
            hf=tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.bias" for x in "qkv"),
            kind="qkv",
            tp_dim=0,
        ),
    ),
    windowed=windows.last_layers_if_used,
)
