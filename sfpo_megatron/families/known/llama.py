"""Llama 2 / 3, R1-Distill-Llama, SmolLM2: the plain pre-norm decoder layer."""

from collections.abc import Iterator

from sfpo_megatron.families.family import Family
from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.families.rule import Rule

_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."

ATTENTION = (
    Rule(
        megatron=_M + "self_attention.linear_qkv.layer_norm_weight",
        hf=(_H + "input_layernorm.weight",),
    ),
    Rule(
        megatron=_M + "self_attention.linear_qkv.weight",
        hf=tuple(_H + f"self_attn.{x}_proj.weight" for x in "qkv"),
        kind="qkv",
        tp_dim=0,
    ),
    Rule(
        megatron=_M + "self_attention.linear_proj.weight",
        hf=(_H + "self_attn.o_proj.weight",),
        tp_dim=1,
    ),
)

LAYER = (
    *ATTENTION,
    Rule(
        megatron=_M + "mlp.linear_fc1.layer_norm_weight",
        hf=(_H + "post_attention_layernorm.weight",),
    ),
    Rule(
        megatron=_M + "mlp.linear_fc1.weight",
        hf=(_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        kind="gate_up",
        tp_dim=0,
    ),
    Rule(megatron=_M + "mlp.linear_fc2.weight", hf=(_H + "mlp.down_proj.weight",), tp_dim=1),
)


def _refused(config: HFConfig) -> Iterator[Finding]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:  # LlamaConfig refuses it, whatever head_dim says
        fix = "restore the model's config.json"
        yield f"hidden_size {hidden} with {heads} heads", "a multiple of the heads", fix
    if "sliding_attention" in (config.get("layer_types") or ()):
        yield "sliding-window attention in a Llama", "full attention", "choose another model"


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    layer=LAYER,
    defaults={"attention_bias": False, "mlp_bias": False},
    nullable=frozenset(("attention_dropout", "head_dim", "num_key_value_heads")),
    refused=_refused,
)
