"""Checks of single fields, for the sections of the config tree. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from sfpo_megatron.errors import InputError
from sfpo_megatron.plugins import Kind

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MEANT = {
    "low_var_kl": "k3",
    "kl": "k1",
    "mse": "k2",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp8": "fp8_per_channel",
    "colocate": "colocated",
    **dict.fromkeys(("huggingface", "hugging_face", "hub", "datasets"), "hf"),
    "json": "jsonl",
    **dict.fromkeys(("gsm8k", "math_verify", "deepscaler", "prime_math", "accuracy"), "math"),
    **dict.fromkeys(("ppo", "grpo", "vanilla", "clip"), "ppo_clip"),
    **dict.fromkeys(("reinforce++", "reinforce_plus_plus"), "reinforce_pp"),
}
"""A value in a peer's config -> the one here that means the same."""
MOST_PROCESSES = 1024
"""No machine has use for more of one kind: starting them would take it down."""


MOST_SECONDS = 1e9
"""The kernel and Python's locks cannot wait ten times as long."""


class FieldError(InputError):
    """One field of one section is wrong: which, what was found, what to do about it."""

    def __init__(self, field_name: str, found: object, expected: str, fix: str) -> None:
        super().__init__(field_name, repr(found), expected, fix)


def at_least(section: DataclassInstance, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:
            raise FieldError(
                name, value, f"a number >= {minimum:g}", f"set {name} to {minimum:g} or more"
            )
        _require_seconds(name, value)


def positive(section: DataclassInstance, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise FieldError(name, value, "a number > 0", f"set {name} above zero")
        _require_seconds(name, value)


def _require_seconds(name: str, value: float | None) -> None:
    if name.endswith("_s") and value is not None and value > MOST_SECONDS:
        expected, fix = f"at most {MOST_SECONDS:g} seconds, 31 years", f"lower {name}"
        raise FieldError(name, value, expected, fix)


def within(section: DataclassInstance, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high:
            raise FieldError(
                name, value, f"a number in [{low:g}, {high:g}]", f"move {name} into that range"
            )


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that stands a second time; None where each stands once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def nearest(found: str, choices: Sequence[str], *, otherwise: str) -> str:
    """What to write for a value that is none of `choices`: the one that a peer's config calls so,
    or that is spelled nearly so; `otherwise` where there is none."""
    low = found.lower()
    close = [one for one in (_MEANT.get(low, low), low) if one in choices]
    close = close or get_close_matches(low, choices, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def known(section: DataclassInstance, kind: Kind, *names: str) -> None:
    """Each field names what is built in, or a user's own as `package.module:name`."""
    for name in names:
        value = getattr(section, name)
        entries = {name: value}
        if isinstance(value, tuple):
            entries = {f"{name}.{index}": entry for index, entry in enumerate(value)}
        for where, found in entries.items():
            if not kind.knows(found):
                fix = nearest(found, kind.names, otherwise="choose one of these, or name your own")
                raise FieldError(where, found, kind.expected, fix)
