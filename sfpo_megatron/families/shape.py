"""What a Hugging Face config.json says about a decoder, in one frozen record. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""`architectures[0]` of config.json -> family file."""
MOE_FAMILIES = ("mixtral", "qwen3_moe")


@dataclass(kw_only=True, frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling; the only kind that is supported."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(kw_only=True, frozen=True, slots=True)
class MoEShape:
    """The experts of a layer; every layer has them."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Hidden units of one expert."""
    normalize_topk: bool
    """The chosen experts' probabilities are divided by their sum."""
    aux_loss_coef: float
    """The model's own load-balancing coefficient, for where that loss is turned on."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelShape:
    """A decoder: every size that Megatron, the refit or the planner needs."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Hidden units of a dense MLP (mixture-of-experts families have none)."""
    moe: MoEShape | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    max_position: int

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Vocabulary rows in Megatron: each tensor-parallel rank holds the same number."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    @property
    def attention_break_even(self) -> float:
        """Tokens of a sequence at which its causal attention takes as many multiplications as its
        linear layers: of n tokens, n^2 * heads * head_dim a layer (two products, half masked)."""
        heads = self.num_heads * self.head_dim
        attention = 2 * self.hidden_size * (heads + self.num_kv_heads * self.head_dim)
        ffn = self.moe.experts_per_token * self.moe.ffn_size if self.moe else self.ffn_size
        mlp = 3 * self.hidden_size * ffn
        linear = self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size
        return linear / (self.num_layers * heads)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory."""
    path = Path(directory) / "config.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` (4)."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(found.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope_scaling: found type {kind!r}, expected default or llama3; "
            "this kind of rope scaling is not supported"
        )
    return base, RopeScaling(
        factor=float(found["factor"]),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
        original_max_position=int(found["original_max_position_embeddings"]),
    )


def moe_shape(config: dict[str, Any], family: str) -> MoEShape | None:
    """Sizes of the experts; None for a dense family."""
    if family not in MOE_FAMILIES:
        return None
    # transformers 5 writes Qwen3-MoE's num_experts under Mixtral's name.
    num_experts = config.get("num_local_experts", config.get("num_experts"))
    mixtral = family == "mixtral"
    return MoEShape(
        num_experts=int(num_experts or 0),
        experts_per_token=int(config.get("num_experts_per_tok") or 0),
        ffn_size=int(config.get("intermediate_size" if mixtral else "moe_intermediate_size") or 0),
        normalize_topk=mixtral or bool(config.get("norm_topk_prob")),
        aux_loss_coef=float(config.get("router_aux_loss_coef") or 0.0),
    )


def refused_experts(config: dict[str, Any], family: str) -> Iterator[tuple[str, str]]:
    """(found, expected) of what a mixture-of-experts config.json asks for and nobody here does."""
    moe = moe_shape(config, family)
    if moe is None:
        return
    for name in ("num_experts", "experts_per_token", "ffn_size"):
        if getattr(moe, name) < 1:
            yield (
                f"no {name} (num_experts, num_experts_per_tok, moe_intermediate_size)",
                "all three",
            )
    if moe.experts_per_token > moe.num_experts:
        yield f"num_experts_per_tok {moe.experts_per_token}", f"at most {moe.num_experts} experts"
    if moe.experts_per_token == 1 and moe.normalize_topk:
        yield "num_experts_per_tok 1, normalized", "2 or more: the router would get no gradient"
    if config.get("mlp_only_layers"):
        yield f"mlp_only_layers {config['mlp_only_layers']}", "experts in every layer"
    if config.get("decoder_sparse_step", 1) != 1:
        yield f"decoder_sparse_step {config['decoder_sparse_step']}", "experts in every layer"
    if config.get("shared_expert_intermediate_size") or config.get("n_shared_experts"):
        yield "shared experts", "routed experts only"
    if family == "mixtral" and config.get("sliding_window"):
        yield f"sliding_window {config['sliding_window']}", "full attention"


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Read a config.json; ValueError names what is not supported."""
    architecture = (config.get("architectures") or ["none"])[0]
    family = SUPPORTED_ARCHITECTURES.get(architecture)
    if family is None:
        raise ValueError(
            f"config.json: architectures: found {architecture}, expected one of "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}; this family is not supported"
        )
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise ValueError(f"config.json: {key}: found true, expected false; not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json: hidden_act: found {config['hidden_act']!r}, expected 'silu'"
        )
    for found, expected in refused_experts(config, family):
        raise ValueError(f"config.json: found {found}, expected {expected}; not supported")
    rope_base, rope_scaling = _rope(config)
    num_heads = int(config["num_attention_heads"])
    return ModelShape(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_size=int(config["intermediate_size"]),
        moe=moe_shape(config, family),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        max_position=int(config.get("max_position_embeddings", 32768)),
    )
