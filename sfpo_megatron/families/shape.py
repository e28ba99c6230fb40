"""What a Hugging Face config.json says about a decoder, in one frozen record. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sfpo_megatron.families.mla import MLAShape, mla_shape, refused_mla
from sfpo_megatron.families.rope import RopeScaling, refused_rope, rope_scaling, rope_settings

SUPPORTED_ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""`architectures[0]` of config.json -> family file."""
MOE_FAMILIES = ("mixtral", "qwen3_moe")

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "vocab_size",
)


class UnsupportedModel(ValueError):
    """A config.json that nothing here trains, or that is broken."""

    def __init__(self, found: str, expected: str, fix: str = "choose another model") -> None:
        super().__init__(f"config.json: found {found}, expected {expected}; {fix}")
        self.found = found
        self.expected = expected
        self.fix = fix


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
    """Of the chosen experts' weights."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelShape:
    """A decoder: every size that Megatron, the refit or the planner needs."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Hidden units of a dense MLP (mixture-of-experts families have none)."""
    moe: MoEShape | None = None
    mla: MLAShape | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    """Of each head's query and key, or of the vectors that they are made from."""
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    max_position: int
    window: int | None = None
    """Tokens that a query of a windowed layer sees, its own included."""
    windowed: tuple[bool, ...] = ()
    """Layer by layer: attends within `window` only. Empty without a window."""
    num_mtp_layers: int = 0
    """Layers after the last that predict further tokens: read past, not trained, not exported."""

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Vocabulary rows in Megatron: each tensor-parallel rank holds the same number."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    @property
    def num_dense_layers(self) -> int:
        """First layers, which have no experts."""
        return self.moe.num_dense_layers if self.moe else self.num_layers

    @property
    def layers_differ(self) -> bool:
        """Some have experts, some have not: Megatron's checkpoints then number them."""
        return 0 < self.num_dense_layers < self.num_layers

    @property
    def value_dim(self) -> int:
        """Of a head's value; `head_dim` is that of its query and key."""
        return self.mla.value_dim if self.mla else self.head_dim

    @property
    def attention_break_even(self) -> float:
        """Tokens of a sequence at which its causal attention takes as many multiplications as its
        linear layers: of n tokens, n^2 / 2 * heads * (head_dim + value_dim) a layer (two products,
        half masked)."""
        heads, hidden, dense = self.num_heads, self.hidden_size, self.num_dense_layers
        if self.mla is not None:
            attention = sum(a * b for a, b in self.mla.matrices(hidden, heads).values())
        else:
            attention = 2 * hidden * (heads + self.num_kv_heads) * self.head_dim
        units = dense * self.ffn_size
        if moe := self.moe:
            passed = moe.experts_per_token * moe.ffn_size + moe.shared_ffn_size
            units += (self.num_layers - dense) * passed
        linear = self.num_layers * attention + 3 * hidden * units + hidden * self.vocab_size
        return linear / (self.num_layers * heads * (self.head_dim + self.value_dim) / 2)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory; ValueError where it is no JSON object."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"found a {type(config).__name__}, not an object")
    return config


def _windowed(config: dict[str, Any], family: str) -> tuple[bool, ...]:
    """Which layers attend within config.json's sliding_window; empty where none does."""
    num_layers, types = int(config["num_hidden_layers"]), config.get("layer_types")
    if family in ("llama", "deepseek_v3") or not config.get("sliding_window"):
        return ()
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return ()
    if family in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", num_layers)
        sliding = [i >= first for i in range(num_layers)]
        if isinstance(types, list):
            sliding = [kind == "sliding_attention" for kind in types]
        return tuple(sliding) if any(sliding) else ()
    return (True,) * num_layers


def _moe_shape(config: dict[str, Any], family: str) -> MoEShape | None:
    """Sizes of the experts; None for a dense family."""
    if family == "deepseek_v3":
        size = int(config.get("moe_intermediate_size") or 0)
        return MoEShape(
            num_experts=int(config.get("n_routed_experts") or 0),
            experts_per_token=int(config.get("num_experts_per_tok") or 0),
            ffn_size=size,
            normalize_topk=bool(config.get("norm_topk_prob")),
            aux_loss_coef=0.0,
            biased_sigmoid=True,
            num_groups=int(config.get("n_group") or 1),
            groups_per_token=int(config.get("topk_group") or 1),
            scaling=float(config.get("routed_scaling_factor") or 1.0),
            num_dense_layers=int(config.get("first_k_dense_replace") or 0),
            shared_ffn_size=size * int(config.get("n_shared_experts") or 0),
        )
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


def _refused_experts(config: dict[str, Any], family: str) -> Iterator[tuple[str, ...]]:
    """What a mixture-of-experts config.json asks for and nobody here does."""
    moe = _moe_shape(config, family)
    if moe is None:
        return
    for name in ("num_experts", "experts_per_token", "ffn_size"):
        if getattr(moe, name) < 1:
            yield (
                f"no {name} (num_experts, num_experts_per_tok, moe_intermediate_size)",
                "all three",
            )
    if family == "deepseek_v3":
        yield from refused_mla(config)
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


def _family(config: dict[str, Any], known: dict[str, str]) -> str:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in known:
        raise UnsupportedModel(
            f"architecture {name}",
            f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            "choose a model of these families",
        )
    return known[name]


def _broken(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """(found, expected, what to do) of sizes that cannot be."""
    fix = "restore the model's config.json"
    for name in _SIZES:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name} = {value!r}", "a positive integer", fix
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim", config.get("kv_lora_rank")) is None and hidden % heads:
        yield f"hidden_size {hidden} with {heads} heads", "a whole head_dim", fix


def _refused(config: dict[str, Any], family: str) -> Iterator[tuple[str, ...]]:
    """(found, expected[, what to do]) of what any family may ask for and nobody here does."""
    if config.get("quantization_config") is not None:
        fix = "use the model before quantization"
        yield "quantization_config", "unquantized weights", fix
    types, num_layers = config.get("layer_types"), config["num_hidden_layers"]
    if isinstance(types, list) and len(types) != num_layers:
        fix = "restore the model's config.json"
        yield f"{len(types)} layer_types", f"one for each of {num_layers} layers", fix
    if family == "llama" and "sliding_attention" in (types or ()):
        yield "sliding-window attention in a Llama", "full attention", "choose another model"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {config['hidden_act']}", "silu", "choose a model with a SwiGLU MLP"
    if config.get("attention_bias"):
        yield "attention_bias", "no attention bias beyond the family's own"
    if config.get("mlp_bias"):
        yield "mlp_bias", "no MLP bias"


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Read a config.json; UnsupportedModel names the first thing in it that cannot be trained."""
    family = _family(config, SUPPORTED_ARCHITECTURES)
    findings = chain(
        _broken(config),
        _refused(config, family),
        refused_rope(config),
        _refused_experts(config, family),
    )
    if first := next(findings, None):
        raise UnsupportedModel(*first)
    return _shape(config, family)


def _shape(config: dict[str, Any], family: str) -> ModelShape:
    windowed = _windowed(config, family)
    num_heads = int(config["num_attention_heads"])
    mla = mla_shape(config) if family == "deepseek_v3" else None
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    return ModelShape(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_size=int(config["intermediate_size"]),
        moe=_moe_shape(config, family),
        mla=mla,
        num_heads=num_heads,
        # transformers files qk_rope_head_dim under head_dim.
        num_kv_heads=num_heads if mla else num_kv_heads,
        head_dim=mla.key_dim if mla else head_dim,
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe", "deepseek_v3"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=rope_settings(config)["rope_theta"],
        rope_scaling=rope_scaling(config),
        max_position=int(config.get("max_position_embeddings", 32768)),
        window=int(config["sliding_window"]) if windowed else None,
        windowed=windowed,
        num_mtp_layers=int(config.get("num_nextn_predict_layers") or 0) if mla else 0,
    )
