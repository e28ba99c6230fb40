"""Rotary embeddings as config.json describes them: scaling and frequencies. No torch.

Formulas: transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.types import Json

Kind = Literal["linear", "llama3", "yarn"]
_ORIGINAL = "original_max_position_embeddings"
_NEEDED: dict[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (_ORIGINAL,),
}
_SCALES = ("mscale", "mscale_all_dim")
_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow"),
}
"""What each kind reads, which must be positive numbers where they are given."""
_OTHERS = ("mrope_section", "xdrope_section", "rope_dim", "use_fope")
"""Keys of other models' rotary embeddings, which the engine would obey."""
_FIX = "restore the model's config.json"


@dataclass(kw_only=True, frozen=True, slots=True)
class RopeScaling:
    """How a model stretches its rotary frequencies to longer contexts."""

    kind: Kind
    factor: float
    low_freq_factor: float = 1.0
    """llama3: below context / this in wavelengths, frequencies stay."""
    high_freq_factor: float = 4.0
    """llama3: above context / this, they are divided by `factor`; between, blended."""
    original_max_position: int = 8192
    """llama3, yarn: the context that the model was first trained on."""
    beta_fast: float = 32.0
    """yarn: pairs with more turns than this in that context stay."""
    beta_slow: float = 1.0
    """yarn: those with fewer are divided by `factor`; between, blended."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """yarn with multi-head latent attention: cosines and sines are multiplied with the ratio of the
    two scales, the logits of attention with the square of the second."""

    @property
    def attention_factor(self) -> float:
        """yarn: what the cosines and sines are multiplied with."""
        if self.kind != "yarn":
            return 1.0
        growth = 0.1 * math.log(self.factor)
        return (growth * self.mscale + 1.0) / (growth * self.mscale_all_dim + 1.0)


def rope_settings(config: HFConfig) -> HFConfig:
    """The one dictionary that transformers makes of `rope_parameters` (5) or of `rope_theta` with
    `rope_scaling` (4).

    Where both are given the older key wins and `rope_parameters` counts for nothing, its theta
    included (modeling_rope_utils.py, convert_rope_params_to_dict).
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    settings = {"rope_theta": config.get("rope_theta", 10000.0), **found, "rope_type": kind}
    if kind in ("llama3", "yarn") and "max_position_embeddings" in config:
        settings.setdefault(_ORIGINAL, config["max_position_embeddings"])
    return settings


def refused_rope(config: HFConfig) -> Iterator[Finding]:
    """(found, expected, what to do) of what a config.json asks for and nobody here does."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            yield f"{name} {config[name]!r}", "an object", _FIX
            return
    rope = rope_settings(config)
    kind, fix = rope["rope_type"], _FIX
    layers = ("full_attention", "sliding_attention")
    if parts := sorted(n for n, value in rope.items() if n in layers or isinstance(value, dict)):
        found = f"rotary embeddings of their own for {', '.join(parts)} layers"
        yield found, "one for all layers", "use a model without them"
    if not _positive(rope["rope_theta"]) or rope["rope_theta"] <= 1:
        yield f"rope_theta {rope['rope_theta']!r}", "a number above 1", fix
    if kind not in ("default", *get_args(Kind)):
        *some, last = get_args(Kind)
        expected = f"rope type default, {', '.join(some)} or {last}"
        yield f"rope type {kind}", expected, "use a model without it"
        return
    if kind != "default" and not rope.get("factor"):
        yield f"rope type {kind} without a factor", "one", fix
    for name in _NEEDED.get(kind, ()):
        if not rope.get(name):
            yield f"rope type {kind} without {name}", "a number", fix
    yield from _refused_scales(config, rope) if kind == "yarn" else ()
    if kind == "yarn" and rope.get("truncate", True) is not True:
        yield "truncate false of rope type yarn", "true", "use a model without it"
    yield from _wrong_numbers(rope, kind)
    if rope.get("type", kind) != kind:
        found = f"rope type {kind} and its older name type {rope['type']!r}"
        yield found, "one type", "remove one of the two"
    for name in _OTHERS:
        if rope.get(name):
            yield f"{name} of rotary embeddings", "none", "use a model without it"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and partial != 1.0:
        expected = "rotary embeddings on the whole head"
        yield f"partial_rotary_factor {partial}", expected, "choose another model"


def _positive(value: Json) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


def _wrong_numbers(rope: HFConfig, kind: str) -> Iterator[Finding]:
    """What a kind reads and no formula can take."""
    for name in _NUMBERS[kind]:
        if name in rope and not _positive(rope[name]):
            yield f"{name} {rope[name]!r} of rope type {kind}", "a positive number", _FIX
        if name == _ORIGINAL and not isinstance(rope[name], int):
            yield f"{name} {rope[name]!r} of rope type {kind}", "an integer", _FIX
    if kind != "default" and rope["factor"] < 1:
        yield f"factor {rope['factor']} of rope type {kind}", "1 or more", _FIX
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        found = "high_freq_factor {high_freq_factor} with low_freq_factor {low_freq_factor}"
        yield found.format(**rope), "a larger one", _FIX
    if kind == "yarn" and rope.get("beta_fast", 32) <= rope.get("beta_slow", 1):
        found = f"beta_fast {rope.get('beta_fast', 32)} with beta_slow {rope.get('beta_slow', 1)}"
        yield found, "a larger one", _FIX


def _refused_scales(config: HFConfig, rope: HFConfig) -> Iterator[Finding]:
    latent = config.get("kv_lora_rank") is not None
    for name in _SCALES:
        if latent and name in rope and not (rope[name] == 0 or _positive(rope[name])):
            yield f"{name} {rope[name]!r} of rope type yarn", "a number", _FIX
    for name in ("attention_factor", *(() if latent else _SCALES)):
        if rope.get(name) is not None:
            yield f"{name} {rope[name]} of rope type yarn", "none", "use a model without it"
    given = [bool(rope.get(name)) for name in _SCALES]
    if latent and given[0] != given[1]:  # transformers and DeepSeek's own code differ then
        found = " and ".join(f"{name} {rope.get(name)}" for name in _SCALES)
        yield f"{found} of rope type yarn", "both or neither", "use a model with both"


def rope_scaling(config: HFConfig) -> RopeScaling | None:
    """The scaling of a config.json that `refused_rope` finds nothing in; None without one."""
    rope = rope_settings(config)
    kind, factor = rope["rope_type"], float(rope.get("factor") or 1.0)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = int(rope[_ORIGINAL])
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            mscale=float(rope.get("mscale") or 1.0),
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        )
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=original,
    )


OTHER_LIMITS = (
    *("n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
"""Keys of other models that vLLM takes for a limit too: ModelArchConfigConvertorBase,
derive_max_model_len_and_key."""


def max_context(config: HFConfig, scaling: RopeScaling | None) -> int:
    """Tokens that a sequence of this model may have, as vLLM works them out.

    `linear` stretches what config.json names. llama3 and yarn stretch
    `original_max_position_embeddings`; most config.json name the stretched length, some (yarn as
    Qwen2.5's page turns it on) still the original.
    """
    limits = [config[name] for name in OTHER_LIMITS if _positive(config.get(name))]
    length = config["max_position_embeddings"]
    if scaling is None:
        return int(min([length, *limits]))
    if scaling.kind == "linear":
        return int(min([length, *limits]) * scaling.factor)
    stretched = scaling.original_max_position * scaling.factor
    return int(min([max(length, stretched), *limits]))


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> list[float]:
    """Radians a position, of each of a head's head_dim / 2 pairs."""
    plain = [base ** -(2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in plain]
    if scaling.kind == "yarn":
        return _yarn(plain, base, scaling)
    return [_llama3(frequency, scaling) for frequency in plain]


def _yarn(plain: list[float], base: float, scaling: RopeScaling) -> list[float]:
    size = 2 * len(plain)

    def pair_with(turns: float) -> float:
        """The dimension whose pair makes so many turns in the original context."""
        ratio = scaling.original_max_position / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high: float = min(math.ceil(pair_with(scaling.beta_slow)), size - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
    return [f / scaling.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # in the original context
    if turns > high:
        return frequency
    if turns < low:
        return frequency / scaling.factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
