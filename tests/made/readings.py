"""Small config.json of every family, and what transformers makes of one: an independent reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfpo_megatron.families.shape import ModelShape, UnsupportedModel, model_shape

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 101,
}
_WINDOWS = {"max_window_layers": 2, "sliding_window": 8, "use_sliding_window": True}
_ROUTED = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", {"head_dim": 16, "sliding_window": 8}),
    "mixtral": (
        "MixtralForCausalLM",
        {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, **_ROUTED},
    ),
    "qwen2": ("Qwen2ForCausalLM", _WINDOWS),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, **_WINDOWS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "use_sliding_window": True,
            **_ROUTED,
            "num_experts": 4,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "num_nextn_predict_layers": 0,
        },
    ),
}
FULL: dict[str, dict[str, Any]] = {
    family: {**_COMMON, **own, "architectures": [architecture], "model_type": family}
    for family, (architecture, own) in _OWN.items()
}
"""Family -> a config.json that says every key that is read."""


def auto_config(folder: Path, config: dict[str, Any]) -> Any:
    """What transformers makes of a config.json; it raises what it raises."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def _windowed(config: Any) -> tuple[bool, ...]:
    if getattr(config, "sliding_window", None) is None or config.model_type in (
        *("llama", "deepseek_v3"),
    ):
        return ()
    if config.model_type in ("qwen2", "qwen3"):
        sliding = tuple(kind == "sliding_attention" for kind in config.layer_types)
        return sliding if any(sliding) else ()
    return (True,) * config.num_hidden_layers


def _experts(config: Any) -> dict[str, Any] | None:
    if config.model_type == "deepseek_v3":
        return {
            "num_experts": config.n_routed_experts,
            "experts_per_token": config.num_experts_per_tok,
            "ffn_size": config.moe_intermediate_size,
            "normalize_topk": bool(config.norm_topk_prob),
            "num_dense_layers": config.first_k_dense_replace,
            "shared_ffn_size": config.moe_intermediate_size * config.n_shared_experts,
            "num_groups": config.n_group,
            "groups_per_token": config.topk_group,
            "scaling": config.routed_scaling_factor,
        }
    if config.model_type not in ("mixtral", "qwen3_moe"):
        return None
    mixtral = config.model_type == "mixtral"
    return {
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "ffn_size": config.intermediate_size if mixtral else config.moe_intermediate_size,
        "normalize_topk": True if mixtral else config.norm_topk_prob,
        "aux_loss_coef": config.router_aux_loss_coef,
    }


def theirs(config: Any) -> dict[str, Any]:
    """Names of our ModelShape -> what they are in a configuration of transformers."""
    latent = config.model_type == "deepseek_v3"
    rope = config.rope_parameters
    scaled = rope["rope_type"] != "default"
    names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    found = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_attention_heads if latent else config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "max_position": config.max_position_embeddings,
        "windowed": _windowed(config),
        "window": config.sliding_window if _windowed(config) else None,
        "rope_base": rope["rope_theta"],
        "rope_kind": rope["rope_type"],
        "rope": {name: rope[name] for name in names if scaled and name in rope},
        "original": rope.get("original_max_position_embeddings") if scaled else None,
        "moe": _experts(config),
        "num_mtp_layers": (config.num_nextn_predict_layers or 0) if latent else 0,
    }
    if latent:
        assert config.head_dim == config.qk_rope_head_dim
        found["head_dim"] = config.qk_head_dim
        found["mla"] = (config.q_lora_rank, config.kv_lora_rank, config.v_head_dim)
    return found


def ours(shape: ModelShape, reference: dict[str, Any]) -> dict[str, Any]:
    """The same of a ModelShape, as far as `reference` (of `theirs`) says something."""
    scaling = shape.rope_scaling
    named = {name: getattr(shape, name) for name in reference if hasattr(shape, name)}
    named["rope_kind"] = scaling.kind if scaling else "default"
    named["rope"] = {name: getattr(scaling, name) for name in reference["rope"]}
    original = scaling is not None and reference["original"] is not None
    named["original"] = scaling.original_max_position if scaling and original else None
    experts = reference["moe"]
    named["moe"] = {name: getattr(shape.moe, name) for name in experts} if experts else shape.moe
    if shape.mla is not None:
        named["mla"] = (shape.mla.query_rank, shape.mla.kv_rank, shape.mla.value_dim)
    return named


def same(folder: Path, config: dict[str, Any]) -> None:
    """Ours takes it, and for what transformers takes it for."""
    reference = theirs(auto_config(folder, config))
    assert ours(model_shape(config), reference) == reference


def same_or_refused(folder: Path, config: dict[str, Any]) -> bool:
    """Ours may refuse; what it takes, transformers must take, and for the same. True: taken."""
    try:
        shape = model_shape(config)
    except UnsupportedModel:
        return False
    reference = theirs(auto_config(folder, config))
    assert ours(shape, reference) == reference, config
    return True


def apart(
    shapes: dict[str, tuple[int, ...]], *, mixtral: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a file: transformers stacks the experts of a layer in memory only."""
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, size in shapes.items():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            yield name, size
            continue
        experts, rows, columns = size
        for expert in range(experts):
            if kind == "gate_up_proj":
                yield f"{prefix}.{expert}.{gate}.weight", (rows // 2, columns)
                yield f"{prefix}.{expert}.{up}.weight", (rows // 2, columns)
            else:
                yield f"{prefix}.{expert}.{down}.weight", (rows, columns)
