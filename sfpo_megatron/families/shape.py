"""What a Hugging Face config.json says about a decoder, in one frozen record. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""`architectures[0]` of config.json -> family file."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling; the only kind that is supported."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelShape:
    """A dense decoder: every size that Megatron, the refit or the planner needs."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
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
    rope_base, rope_scaling = _rope(config)
    num_heads = int(config["num_attention_heads"])
    return ModelShape(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        max_position=int(config.get("max_position_embeddings", 32768)),
    )
