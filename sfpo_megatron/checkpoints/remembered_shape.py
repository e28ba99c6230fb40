"""What a checkpoint remembers of its model's config.json: its weights do not say it. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfpo_megatron.checkpoints.store import CheckpointError, state_in
from sfpo_megatron.families.shape import ModelShape

KEY = "model"
"""The key in run_state.json; the versions before had none."""
_NO_FUNCTION = ("max_position", "max_context", "num_mtp_layers")
"""Fields of ModelShape that change no log-prob."""


def remembered(shape: ModelShape) -> dict[str, Any]:
    """The fields of `shape` that change log-probs, as they are read back from JSON."""
    fields = dataclasses.asdict(shape).items()
    function = {name: value for name, value in fields if name not in _NO_FUNCTION}
    found: dict[str, Any] = json.loads(json.dumps(function))
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what both have: another version may have other fields."""
    for name in then.keys() & now.keys():
        before, value = then[name], now[name]
        if isinstance(before, dict) and isinstance(value, dict):
            yield from differences(before, value)
        elif before != value:
            yield name, before, value


def hold_to_shape(checkpoint: Path, shape: ModelShape, hf: Path, *, fix: str) -> None:
    """CheckpointError, with `fix`, where the run that wrote `checkpoint` had another model than
    `shape`, which the config.json in `hf` says: one of the same sizes would be taken for it, and
    compute otherwise."""
    known = state_in(checkpoint).get(KEY)
    then = known.get("shape") if isinstance(known, dict) else None
    if not isinstance(then, dict):
        return
    for name, before, value in differences(then, remembered(shape)):
        raise CheckpointError(
            f"{hf}/config.json: found {name} {value}, expected {before} as the run that wrote "
            f"{checkpoint} had it; {fix}"
        )
