"""Qwen3-MoE (Qwen3-30B-A3B): Qwen3's attention, and experts in every layer."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.experts import moe_rules
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama, qwen3
from sfpo_megatron.families.moe import routed_experts

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    layer=(
        *llama.ATTENTION,
        *qwen3.QK_NORMS,
        *moe_rules(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    windowed=windows.every_layer_if_used,
    defaults={
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    nullable=frozenset(("mlp_only_layers", "sliding_window")),
    aliases={"num_local_experts": "num_experts"},
    moe=routed_experts,
)
