"""DeepSeek-V3, R1: multi-head latent attention; first layers with an MLP, the others with experts.

Megatron's TE names: the norms of the short vectors belong to the linears that they feed, the norm
in front of attention is a module of its own (its linears are two).
"""

from sfpo_megatron.families.experts import CHOICE_BIAS, SHARED, moe_rules
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama
from sfpo_megatron.families.mla import mla_shape, refused_mla
from sfpo_megatron.families.moe import grouped_experts
from sfpo_megatron.families.rule import Rule, only

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

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    layer=(
        *_ATTENTION,
        *only("latent_query", _LATENT_QUERY),
        *only("whole_query", _QUERY),
        *only("dense", _MLP),
        *only("experts", (*_EXPERTS, CHOICE_BIAS, *SHARED)),
    ),
    moe=grouped_experts,
    mla=mla_shape,
    mtp_layers="num_nextn_predict_layers",
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "output_router_logits": False,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "v_head_dim": 128,
    },
    nullable=frozenset(
        (
            *("attention_dropout", "norm_topk_prob", "num_key_value_heads"),
            *("num_nextn_predict_layers", "q_lora_rank", "rope_interleave"),
        )
    ),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    refused=refused_mla,
)
