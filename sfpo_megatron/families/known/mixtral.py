"""Mixtral: Llama's attention, and experts in every layer (w1 gate, w3 up, w2 down)."""

from functools import partial

from sfpo_megatron.families import windows
from sfpo_megatron.families.experts import moe_rules
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama
from sfpo_megatron.families.moe import routed_experts

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    layer=(*llama.ATTENTION, *moe_rules(block="block_sparse_moe", gate="w1", up="w3", down="w2")),
    windowed=windows.every_layer,
    defaults={
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    },
    nullable=frozenset(("head_dim", "sliding_window")),
    aliases={"num_experts": "num_local_experts"},
    moe=partial(routed_experts, size="intermediate_size", normalized=True),
)
