"""Rotary embeddings in the forms that config.json have them in, and in forms that nobody reads."""

from __future__ import annotations

from typing import Any

_ORIGINAL = {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    **_ORIGINAL,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
DEFAULT = {"rope_type": "default", "rope_theta": 2e4}
DICTS: dict[str, dict[str, Any] | None] = {
    "null": None,
    "empty": {},
    "default": DEFAULT,
    "only_theta": {"rope_theta": 3e4},
    "only_type": {"rope_type": "default"},
    "linear": LINEAR,
    "linear_theta": {**LINEAR, "rope_theta": 4e4},
    "older_linear": {"type": "linear", "factor": 2},
    "llama3": LLAMA3,
    "llama3_theta": {**LLAMA3, "rope_theta": 7e4},
    "llama3_of_this_length": {k: v for k, v in LLAMA3.items() if k not in _ORIGINAL},
    "yarn": YARN,
    "yarn_theta": {**YARN, "rope_theta": 5e4, "beta_fast": 16, "beta_slow": 2.0},
    "yarn_of_this_length": {"rope_type": "yarn", "factor": 2.0},
    "older_yarn": {"type": "yarn", "factor": 2.0, **_ORIGINAL},
    "scaled_yarn": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "both_types": {**YARN, "type": "yarn"},
    "whole": {**DEFAULT, "partial_rotary_factor": 1.0},
}
BROKEN: dict[str, Any] = {
    "of_each_kind_of_layer": {"full_attention": DEFAULT, "sliding_attention": LINEAR},
    "of_one_kind_of_layer": {"full_attention": YARN},
    "of_no_layer": {"full_attention": None},
    "nested_and_flat": {**DEFAULT, "full_attention": LINEAR},
    "partial": {**DEFAULT, "partial_rotary_factor": 0.5},
    "two_types": {**YARN, "type": "linear"},
    "two_types_of_none": {**DEFAULT, "type": "yarn", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "su": {"type": "su", "factor": 2.0},
    "mrope": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "default_mrope": {**DEFAULT, "mrope_section": [2, 3, 3]},
    "null_type": {"rope_type": None},
    "unknown_type": {"rope_type": "spiral"},
    "list": [YARN],
    "text": "yarn",
    "true": True,
    "yarn_without_factor": {"rope_type": "yarn", **_ORIGINAL},
    "yarn_null_factor": {**YARN, "factor": None},
    "yarn_null_original": {**YARN, "original_max_position_embeddings": None},
    "yarn_attention_factor": {**YARN, "attention_factor": 1.5},
    "yarn_not_truncated": {**YARN, "truncate": False},
    "yarn_null_beta": {**YARN, "beta_fast": None},
    "text_factor": {**YARN, "factor": "4"},
    "small_factor": {**LINEAR, "factor": 0.5},
    "infinite_factor": {**LINEAR, "factor": float("inf")},
    "true_factor": {**LINEAR, "factor": True},
    "fractional_original": {**YARN, "original_max_position_embeddings": 64.5},
    "llama3_without_high": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"},
    "llama3_bounds": {**LLAMA3, "high_freq_factor": 1.0},
    "null_theta": {"rope_theta": None},
    "text_theta": {**DEFAULT, "rope_theta": "1e4"},
    "negative_theta": {**DEFAULT, "rope_theta": -1e4},
    "theta_of_one": {**DEFAULT, "rope_theta": 1},
}
