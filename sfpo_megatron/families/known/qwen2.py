"""Qwen2, Qwen2.5, Qwen2.5-Math, R1-Distill-Qwen: Llama's layer plus biases on q, k and v."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama
from sfpo_megatron.families.rule import Rule

DEFAULTS = {
    "intermediate_size": 22016,
    "layer_types": None,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
NULLABLE = frozenset(("layer_types", "num_key_value_heads", "sliding_window"))

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
    defaults=DEFAULTS,
    nullable=NULLABLE,
)
