"""What vLLM reads in a config.json otherwise than transformers, whose reading the trainer takes.

The engine would then compute another model than the trainer, or not start. No torch. The names are
vLLM 0.32's: transformers_utils/config.py, transformers_utils/model_arch_config_convertor.py and
model_executor/models/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.families.keys import RESTORE, resolved
from sfpo_megatron.families.known import FAMILIES
from sfpo_megatron.families.rope import OTHER_LIMITS, rope_settings
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.types import Json

_REMOVE = "remove it, or choose another model"
_ENGINE_ONLY: Mapping[str, tuple[Json, ...]] = {
    **dict.fromkeys(("attention_bias", "bias", "qkv_bias", "qk_norm", "mlp_bias"), (False, None)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"), (1, None)),
    **dict.fromkeys(("dual_chunk_attention_config", "llama_4_scaling"), (None,)),
    **dict.fromkeys(("n_head_kv", "num_kv_heads", "multi_query_group_num"), (None,)),
    **dict.fromkeys(("num_attention_groups", "hidden_size_per_head", "rswa_window"), (None,)),
    **dict.fromkeys(("text_config", "per_layer_config", "block_configs"), (None,)),
    **dict.fromkeys(("moe_router_dtype", "rotary_emb_base"), (None,)),
    "ada_rms_norm_t_cond": (False,),
    "head_dtype": (None, "model"),
    "is_causal": (True,),
    "logit_scale": (1,),
}
"""Keys that vLLM's classes of these models obey and transformers' do not -> what is harmless."""
_PRESENT = ("target_layer_count", "compress_ratios", "index_topk")
"""The same, where it counts that the key is there at all."""


def engine_differs(config: HFConfig, shape: ModelShape) -> Iterator[Finding]:
    """(found, expected, what to do) of what in a config.json, whose shape is `shape`, the two do
    not take for the same."""
    yield from _unknown_to_transformers(config)
    for name in OTHER_LIMITS:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield f"{name} {value!r}, which vLLM compares with lengths", "a number", _REMOVE
    full = resolved(config, FAMILIES[shape.family])
    yield from _windows(full, shape)
    own = full["hidden_size"] // shape.num_heads
    if shape.family == "qwen2" and shape.head_dim != own:
        found = f"head_dim {shape.head_dim}, which vLLM's Qwen2 does not read"
        yield found, f"hidden_size / num_attention_heads ({own})", "choose another model"
    name = "original_max_position_embeddings"
    rope, outside = rope_settings(full), config.get(name)
    if name in config and outside != rope.get(name, outside):
        found = f"{name} {outside!r} beside the rotary embeddings' own {rope[name]}"
        yield found, "one value", "remove one: transformers takes the second, vLLM the first"


def _unknown_to_transformers(config: HFConfig) -> Iterator[Finding]:
    if "model_type" not in config:
        yield "no model_type", "the model's", RESTORE
    for name, harmless in _ENGINE_ONLY.items():
        if name in config and config[name] not in harmless:
            found = f"{name} {config[name]!r}, which only the engine would obey"
            yield found, "no such key", _REMOVE
    for name in _PRESENT:
        if name in config:
            yield f"{name}, which only the engine would obey", "no such key", _REMOVE


def _windows(full: HFConfig, shape: ModelShape) -> Iterator[Finding]:
    """vLLM gives every layer the window that its configuration class is left with; Llama's and
    Mistral's classes let `layer_types` say which."""
    window = full.get("sliding_window")
    if "use_sliding_window" in FAMILIES[shape.family].defaults and not full["use_sliding_window"]:
        window = None
    engine = (window is not None,) * shape.num_layers
    types = full.get("layer_types")
    if window is not None and types and shape.family in ("llama", "mistral"):
        engine = tuple(kind == "sliding_attention" for kind in types)
    trainer = shape.windowed or (False,) * shape.num_layers
    if engine != trainer:
        yield (
            f"a sliding window of {window} tokens in {sum(engine)} layers for the engine and in "
            f"{sum(trainer)} of {shape.num_layers} for transformers",
            "the same layers",
            "set sliding_window to null if no layer has one; vLLM cannot give it to some layers",
        )
