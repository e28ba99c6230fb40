"""Qwen2, Qwen2.5, Qwen2.5-Math, R1-Distill-Qwen: Llama's layer plus biases on q, k and v."""

from sfpo_megatron.families import llama
from sfpo_megatron.families.rules import Rule

LAYER = (
    *llama.LAYER,
    Rule(
        megatron="decoder.layers.{layer}.self_attention.linear_qkv.bias",
        hf=tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.bias" for x in "qkv"),
        kind="qkv",
        tp_dim=0,
    ),
)
