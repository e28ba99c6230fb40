"""What a Hugging Face config.json says about a decoder, in one frozen record. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sfpo_megatron.errors import InputError
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.families.json_file import read_object
from sfpo_megatron.families.keys import RESTORE, resolved, wrong_values
from sfpo_megatron.families.known import FAMILIES, SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.mla import MLAShape
from sfpo_megatron.families.moe import MoEShape, refused_experts
from sfpo_megatron.families.rope import (
    RopeScaling,
    max_context,
    refused_rope,
    rope_scaling,
    rope_settings,
)


class UnsupportedModel(InputError):
    """A config.json that nothing here trains, or that is broken."""

    def __init__(self, found: str, expected: str, fix: str = "choose another model") -> None:
        super().__init__("config.json", found, expected, fix)


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
    """Each head's query and key are normed, or the vectors that they are made from."""
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    max_position: int
    """Positions that config.json names."""
    max_context: int
    """Tokens that a sequence may have: more, where rotary embeddings are stretched."""
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
        """Size of a head's value; `head_dim` is that of its query and key."""
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


def read_hf_config(directory: str | Path) -> HFConfig:
    """The config.json of a Hugging Face directory; ModelFilesError where it is no JSON object."""
    return read_object(Path(directory) / "config.json", fix="restore the model's config.json")


def _family(config: HFConfig) -> Family:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {name}",
            f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            "choose a model of these families",
        )
    family = FAMILIES[SUPPORTED_ARCHITECTURES[name]]
    if (kind := config.get("model_type", family.name)) != family.name:
        # The first decides what the keys mean, the second what is computed with them.
        raise UnsupportedModel(
            f"model_type {kind!r} with architecture {name}", repr(family.name), RESTORE
        )
    return family


def _broken(config: HFConfig) -> Iterator[Finding]:
    """(found, expected, what to do) of sizes that do not go together."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_lora_rank") is not None:
        return  # latents: neither number of heads nor head_dim is used
    if config["head_dim"] is None and hidden % heads:
        yield f"hidden_size {hidden} with {heads} heads", "a whole head_dim", RESTORE
    if (size := config["head_dim"] or hidden // heads) % 2:
        yield f"head_dim {size}", "an even number: rotary embeddings turn pairs", RESTORE
    groups = config["num_key_value_heads"] or heads
    if heads % groups:
        found = f"num_attention_heads {heads} with num_key_value_heads {groups}"
        yield found, "a multiple of num_key_value_heads", RESTORE


def _refused(config: HFConfig) -> Iterator[Finding]:
    """(found, expected[, what to do]) of what any family may ask for and nobody here does."""
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            yield name, "unquantized weights", "use the model before quantization"
    types, num_layers = config.get("layer_types"), config["num_hidden_layers"]
    if isinstance(types, list) and len(types) != num_layers:
        yield f"{len(types)} layer_types", f"one for each of {num_layers} layers", RESTORE
    if config["hidden_act"] != "silu":
        yield f"hidden_act {config['hidden_act']}", "silu", "choose a model with a SwiGLU MLP"
    if config.get("attention_bias"):
        yield "attention_bias", "no attention bias beyond the family's own"
    if config.get("mlp_bias"):
        yield "mlp_bias", "no MLP bias"


def _refused_of(config: HFConfig, family: Family) -> Iterator[Finding]:
    """The same for what the family has: its experts, and what is its own."""
    yield from family.refused(config)
    if family.moe is not None:
        yield from refused_experts(config, family.moe(config))


def model_shape(config: HFConfig) -> ModelShape:
    """Read a config.json; UnsupportedModel names the first thing in it that cannot be trained."""
    family = _family(config)
    given, config = config, resolved(config, family)
    findings = chain(
        wrong_values(given, family),
        _broken(config),
        _refused(config),
        refused_rope(config),
        _refused_of(config, family),
    )
    if first := next(findings, None):
        raise UnsupportedModel(*first)
    return _shape(config, family)


def _shape(config: HFConfig, family: Family) -> ModelShape:
    windowed = family.windowed(config)
    num_heads = int(config["num_attention_heads"])
    mla = family.mla(config) if family.mla else None
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    scaling = rope_scaling(config)
    return ModelShape(
        family=family.name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_size=int(config["intermediate_size"]),
        moe=family.moe(config) if family.moe else None,
        mla=mla,
        num_heads=num_heads,
        # transformers files qk_rope_head_dim under head_dim.
        num_kv_heads=num_heads if mla else num_kv_heads,
        head_dim=mla.key_dim if mla else head_dim,
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=float(config["rms_norm_eps"]),
        rope_base=float(rope_settings(config)["rope_theta"]),
        rope_scaling=scaling,
        max_position=int(config["max_position_embeddings"]),
        max_context=max_context(config, scaling),
        window=int(config["sliding_window"]) if windowed else None,
        windowed=windowed,
        num_mtp_layers=int(config.get(family.mtp_layers) or 0) if family.mtp_layers else 0,
    )
