"""Whether model.path is still what the run began with.

A checkpoint has the policy's weights and not what config.json says of them, nor the reference
policy of a KL term, which is read from model.path at every start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfpo_megatron.checkpoints.remembered_shape import (
    KEY,
    differences,
    hold_to_shape,
    remembered,
)
from sfpo_megatron.checkpoints.store import CheckpointError, Found
from sfpo_megatron.checkpoints.torch_records import tensor_sizes
from sfpo_megatron.checkpoints.weight_keys import weight_places
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.weight_files import weight_files

BEGAN_FROM = "began_from"
"""The key of the checkpoint whose weights alone the run began with; null where those were
model.path's."""
_SPOTS, _SPOT_BYTES = 16, 4096


def print_of(model_path: str) -> dict[str, Any] | None:
    """What a checkpoint remembers of a model directory; None where it cannot be read."""
    directory = Path(model_path)
    try:
        shape = remembered(model_shape(read_hf_config(directory)))
        digest = hashlib.sha256()
        for file in weight_files(directory).paths:
            _sample(file, digest)
    except (OSError, ValueError):
        return None
    return {"shape": shape, "weights": digest.hexdigest()}


def origin_of(model_path: str) -> dict[str, Any]:
    """What run_state.json remembers of the beginning of a run that begins with model.path."""
    return {KEY: print_of(model_path), BEGAN_FROM: None}


def carried_over(state: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a run that continues at `state`; `now`: of one that would begin. Whose weights
    it began with stays known: without a KL term those of model.path may be others since."""
    began_from, then, print_now = state.get(BEGAN_FROM), state.get(KEY), now.get(KEY)
    if then is not None:
        print_now = {**(print_now or then), "weights": then["weights"]}
    return {KEY: print_now, BEGAN_FROM: began_from}


def _sample(file: Path, digest: Any) -> None:
    """Size and evenly spread spots: training changes all of a file, and shards are large."""
    size = file.stat().st_size
    digest.update(f"{size} ".encode())
    with file.open("rb") as stream:
        for spot in range(_SPOTS):
            stream.seek(spot * max(0, size - _SPOT_BYTES) // (_SPOTS - 1))
            digest.update(stream.read(_SPOT_BYTES))


def hold_to_model(
    config: RunConfig, found: Found, state: Mapping[str, Any], *, with_reference: bool = True
) -> None:
    """CheckpointError where the run would continue as another model, or beside another reference.
    `state`: run_state.json of the checkpoint. `with_reference`: a warm start has none, whatever
    objective.kl says."""
    has_reference = with_reference and config.objective.kl.coef > 0
    if has_reference and (began_from := state.get(BEGAN_FROM)) is not None:
        raise CheckpointError(
            f"objective.kl.coef: found {config.objective.kl.coef:g} in a run that began from the "
            f"weights of {began_from}, expected 0: the penalty's reference would be model.path; "
            "set it to 0, or begin a new run with these weights as model.path"
        )
    then, now = state.get(KEY), print_of(config.model.path)
    if then is None or now is None:
        return
    for name, before, value in differences(then["shape"], now["shape"]):
        raise CheckpointError(
            f"model.path: found {name} {value} in {config.model.path}/config.json, expected "
            f"{before} as in {found.directory.name}; restore it, or begin a new run from the "
            "checkpoint by tools/convert_megatron_to_hf.py"
        )
    if has_reference and then["weights"] != now["weights"]:
        raise CheckpointError(
            f"model.path: found other weights in {config.model.path} than when "
            f"{found.directory.name} was written, expected the same: they are the reference of "
            "objective.kl; restore them, or set objective.kl.coef to 0"
        )


def hold_weights_to_model(config: RunConfig, found: Found) -> None:
    """CheckpointError where a run would begin from weights alone, by Megatron-LM or by a warm
    start, that are not those of the model in model.path."""
    path = Path(config.model.path)
    shape = model_shape(read_hf_config(path))
    weight_places(found.directory, shape, tensor_sizes(found.directory))
    fix = "set model.path to the model of that run"
    hold_to_shape(found.directory, shape, path, fix=fix)
