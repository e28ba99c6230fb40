"""DeepSeek-V3, R1: multi-head latent attention; first layers with an MLP, the others with experts.

Megatron's TE names: the norms of the short vectors belong to the linears that they feed, the norm
in front of attention is a module of its own (its linears are two).
"""

from sfpo_megatron.families import llama
from sfpo_megatron.families.experts import CHOICE_BIAS, SHARED, moe_rules
from sfpo_megatron.families.rules import Rule
from sfpo_megatron.families.shape import ModelShape

_A = "decoder.layers.{layer}.self_attention."
_H = "model.layers.{layer}."

_QUERY = (
    Rule(megatron=_A + "linear_q_proj.weight", hf=(_H + "self_attn.q_proj.weight",), tp_dim=0),
)
_LATENT_QUERY = (
    Rule(megatron=_A + "linear_q_down_proj.weight", hf=(_H + "self_attn.q_a_proj.weight",)),
    Rule(
        megatron=_A + "linear_q_up_proj.layer_norm_weight",
        hf=(_H + "self_attn.q_a_layernorm.weight",),
    ),
    Rule(megatron=_A + "linear_q_up_proj.weight", hf=(_H + "self_attn.q_b_proj.weight",), tp_dim=0),
)
_ATTENTION = (
    Rule(
        megatron="decoder.layers.{layer}.input_layernorm.weight",
        hf=(_H + "input_layernorm.weight",),
    ),
    Rule(
        megatron=_A + "linear_kv_down_proj.weight",
        hf=(_H + "self_attn.kv_a_proj_with_mqa.weight",),
    ),
    Rule(
        megatron=_A + "linear_kv_up_proj.layer_norm_weight",
        hf=(_H + "self_attn.kv_a_layernorm.weight",),
    ),
    Rule(
        megatron=_A + "linear_kv_up_proj.weight",
        hf=(_H + "self_attn.kv_b_proj.weight",),
        tp_dim=0,
    ),
    Rule(megatron=_A + "linear_proj.weight", hf=(_H + "self_attn.o_proj.weight",), tp_dim=1),
)
_MLP = tuple(rule for rule in llama.LAYER if rule not in llama.ATTENTION)
_EXPERTS = moe_rules(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def layer(shape: ModelShape, index: int) -> tuple[Rule, ...]:
    """The rules of layer `index`."""
    latent = shape.mla is not None and shape.mla.query_rank is not None
    attention = (*_ATTENTION, *(_LATENT_QUERY if latent else _QUERY))
    if index < shape.num_dense_layers:
        return (*attention, *_MLP)
    return (*attention, *_EXPERTS, CHOICE_BIAS, *SHARED)
