"""The experts of a layer, as config.json describes them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sfpo_megatron.families.hf_config import Finding, HFConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class MoEShape:
    """The experts of a layer."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Hidden units of one expert."""
    normalize_topk: bool
    """The chosen experts' probabilities are divided by their sum."""
    aux_loss_coef: float
    """The model's own load-balancing coefficient, for where that loss is turned on."""
    num_dense_layers: int = 0
    """First layers, which have an MLP in place of experts."""
    shared_ffn_size: int = 0
    """Hidden units of the expert that every token passes."""
    biased_sigmoid: bool = False
    """DeepSeek-V3's router: scores are sigmoids; a bias of each expert, which no optimizer holds,
    counts where experts are chosen and not where they are weighed."""
    num_groups: int = 1
    groups_per_token: int = 1
    """Experts are chosen from the best groups only."""
    scaling: float = 1.0
    """Factor of the chosen experts' weights."""


def routed_experts(
    config: HFConfig, *, size: str = "moe_intermediate_size", normalized: bool | None = None
) -> MoEShape:
    """Experts in every layer, chosen by a softmax. `size`: the key of an expert's hidden units;
    `normalized`: `normalize_topk`, if config.json's `norm_topk_prob` does not decide it."""
    # Mixtral's name and Qwen3-MoE's; each is the other's second name (Family.aliases).
    num_experts = config.get("num_local_experts", config.get("num_experts"))
    normalize_topk = config["norm_topk_prob"] if normalized is None else normalized
    return MoEShape(
        num_experts=int(num_experts or 0),
        experts_per_token=int(config["num_experts_per_tok"]),
        ffn_size=int(config[size]),
        normalize_topk=bool(normalize_topk),
        aux_loss_coef=float(config["router_aux_loss_coef"]),
    )


def grouped_experts(config: HFConfig) -> MoEShape:
    """DeepSeek-V3's: after some dense layers, chosen from groups by biased sigmoids, and a shared
    one beside them."""
    size = int(config["moe_intermediate_size"])
    return MoEShape(
        num_experts=int(config["n_routed_experts"]),
        experts_per_token=int(config["num_experts_per_tok"]),
        ffn_size=size,
        normalize_topk=bool(config.get("norm_topk_prob")),
        aux_loss_coef=0.0,
        biased_sigmoid=True,
        num_groups=int(config["n_group"]),
        groups_per_token=int(config["topk_group"]),
        scaling=float(config["routed_scaling_factor"]),
        num_dense_layers=int(config["first_k_dense_replace"]),
        shared_ffn_size=size * int(config["n_shared_experts"]),
    )


def refused_experts(config: HFConfig, moe: MoEShape) -> Iterator[Finding]:
    """(found, expected) of what a mixture-of-experts config.json asks for and nobody here does."""
    if moe.experts_per_token > moe.num_experts:
        yield f"num_experts_per_tok {moe.experts_per_token}", f"at most {moe.num_experts} experts"
    if moe.experts_per_token == 1 and moe.normalize_topk:
        yield "num_experts_per_tok 1, normalized", "2 or more: the router would get no gradient"
    if config.get("mlp_only_layers"):
        yield f"mlp_only_layers {config['mlp_only_layers']}", "experts in every layer"
    if config.get("decoder_sparse_step", 1) != 1:
        yield f"decoder_sparse_step {config['decoder_sparse_step']}", "experts in every layer"
    if config.get("shared_expert_intermediate_size"):
        yield "shared experts", "routed experts only"
