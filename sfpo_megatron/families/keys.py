"""What each key of a config.json may hold, as transformers takes it. No torch.

Its configurations are strict: "64", 64.0 and true are no integers to it, 1 is no float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from sfpo_megatron.families.family import DEFAULTS, Family
from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.types import Json

RESTORE = "restore the model's config.json"
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _integer(value: Json, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _size(value: Json) -> bool:
    return _integer(value, 1)


def _count(value: Json) -> bool:
    return _integer(value, 0)


def _id(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(value: Json) -> bool:
    return _id(value) or (isinstance(value, list) and all(_id(item) for item in value))


def _number(value: Json) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _rate(value: Json) -> bool:
    return _count(value) or _number(value)


def _flag(value: Json) -> bool:
    return isinstance(value, bool)


def _text(value: Json) -> bool:
    return isinstance(value, str)


def _dtype(value: Json) -> bool:
    return value in _DTYPES


def _layers(value: Json) -> bool:
    return isinstance(value, list) and all(_count(item) for item in value)


def _layer_types(value: Json) -> bool:
    return isinstance(value, list) and set(value) <= {"full_attention", "sliding_attention"}


_POSITIVE = "a positive integer"
_KINDS: tuple[tuple[str, Callable[[Json], bool], tuple[str, ...]], ...] = (
    (
        *(_POSITIVE, _size),
        (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
            *("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"),
            *("sliding_window", "num_experts", "num_local_experts", "n_routed_experts"),
            *("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
            *("n_group", "topk_group", "n_shared_experts", "q_lora_rank", "kv_lora_rank"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        ),
    ),
    (
        *("an integer, 0 or more", _count),
        ("max_window_layers", "first_k_dense_replace", "num_nextn_predict_layers"),
    ),
    (
        *("a finite number with a point, 0 or more (1.0, not 1)", _number),
        ("rms_norm_eps", "router_aux_loss_coef", "routed_scaling_factor", "initializer_range"),
    ),
    ("a number, 0 or more", _rate, ("attention_dropout",)),
    (
        *("true or false", _flag),
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
            *("norm_topk_prob", "rope_interleave", "use_cache", "output_router_logits"),
        ),
    ),
    ("a text", _text, ("hidden_act",)),
    (f"one of {', '.join(_DTYPES)}", _dtype, ("dtype", "torch_dtype")),
    ("an integer", _id, ("bos_token_id", "pad_token_id")),
    ("an integer or a list of them", _ids, ("eos_token_id",)),
    ("a list of layers", _layers, ("mlp_only_layers",)),
    ("a list of full_attention and sliding_attention", _layer_types, ("layer_types",)),
)
KINDS: Mapping[str, tuple[str, Callable[[Json], bool]]] = {
    key: (expected, holds) for expected, holds, keys in _KINDS for key in keys
}
"""Key -> what it may hold in words, and as a test."""
REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Keys without which no model is meant: transformers has defaults for these too, of one size of the
architecture, but a config.json without them is a broken one."""
_ALWAYS_NULLABLE = frozenset(
    ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
)


def resolved(config: HFConfig, family: Family) -> HFConfig:
    """The config.json under the names that the family reads, with what it leaves out filled in."""
    named = {key: value for key, value in config.items() if key not in family.aliases}
    for other, key in family.aliases.items():
        if other in config:
            named[key] = config[other]
    return {**DEFAULTS, **family.defaults, **named}


def wrong_values(config: HFConfig, family: Family) -> Iterator[Finding]:
    """(found, expected, what to do) of keys that hold what transformers does not take, or nothing
    where something is needed. `config` is as it is in the file."""
    for other, key in family.aliases.items():
        if other in config and config.get(key, config[other]) != config[other]:
            found = f"{key} {config[key]!r} and {other} {config[other]!r}"
            yield found, "one of the two names of one size", f"remove one; {RESTORE}"
    full = resolved(config, family)
    for key in REQUIRED:
        if key not in full:
            yield f"{key} = None", KINDS[key][0], RESTORE
    read = {*REQUIRED, *DEFAULTS, *family.defaults}
    for key, (expected, holds) in KINDS.items():
        if key not in full or key not in read:
            continue
        value = full[key]
        if value is None and (key not in config or key in family.nullable | _ALWAYS_NULLABLE):
            continue
        if not holds(value):
            yield f"{key} = {value!r}", expected, RESTORE
