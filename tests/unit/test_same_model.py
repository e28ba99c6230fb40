"""A run that continues does so as the model that it was, beside the reference that it had."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made.configs import run_config
from safetensors.torch import save_file

from sfpo_megatron.checkpoints.remembered_shape import KEY
from sfpo_megatron.checkpoints.store import CheckpointError, Found
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.run.same_model import (
    BEGAN_FROM,
    carried_over,
    hold_to_model,
    origin_of,
    print_of,
)


def write_weights(directory: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 1024, generator=generator)
    save_file({"model.embed_tokens.weight": weight}, directory / "model.safetensors")


@pytest.fixture
def model(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    directory = model_dir()
    write_weights(directory, 0)
    return directory


def edit(model: Path, **keys: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def start(model: Path, state: dict[str, Any], kl: float = 0.0) -> None:
    """What a start does with the run_state.json of its checkpoint."""
    config: RunConfig = run_config()
    objective = replace(config.objective, kl=replace(config.objective.kl, coef=kl))
    config = replace(config, model=replace(config.model, path=str(model)), objective=objective)
    found = Found(directory=Path("step_0000003"), step=3, has_run_state=True)
    hold_to_model(config, found, json.loads(json.dumps(state)))


def test_the_same_model_continues(model: Path, tmp_path: Path) -> None:
    """Elsewhere too, and with more positions; of the format before nothing is known."""
    state = {KEY: print_of(str(model))}
    assert state[KEY] is not None
    start(model, state, kl=0.1)
    edit(model, max_position_embeddings=4096)
    moved = model.rename(tmp_path / "moved")
    start(moved, state, kl=0.1)
    state[KEY]["shape"]["a_field_of_later"] = 3
    del state[KEY]["shape"]["window"]  # of a version before
    start(moved, state, kl=0.1)
    edit(moved, rms_norm_eps=0.5)
    start(moved, {}, kl=0.1)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("norm_eps", {"rms_norm_eps": 0.5}),
        ("rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_another_config_json(model: Path, name: str, keys: dict[str, Any]) -> None:
    """The weights would be taken for another function, by trainer and engines alike."""
    state = {KEY: print_of(str(model))}
    edit(model, **keys)
    with pytest.raises(CheckpointError, match=f"found {name} .*as in step_0000003"):
        start(model, state)


def test_another_reference(model: Path) -> None:
    """Without a KL term the weights of model.path are of no matter: the checkpoint has its own."""
    state = {KEY: print_of(str(model))}
    write_weights(model, 1)
    start(model, state)
    with pytest.raises(CheckpointError, match=r"found other weights .*reference of objective\.kl"):
        start(model, state, kl=0.1)
    write_weights(model, 0)
    start(model, state, kl=0.1)


def test_a_reference_that_the_run_did_not_begin_from(model: Path) -> None:
    """It began without a KL term, from the weights of a checkpoint alone; nothing of it is left in
    model.path."""
    state = {KEY: print_of(str(model)), BEGAN_FROM: "other/iter_0000005"}
    start(model, state)
    with pytest.raises(CheckpointError, match=r"^objective\.kl\.coef: .* of other/iter_0000005, "):
        start(model, state, kl=0.1)
    start(model, state | {BEGAN_FROM: None}, kl=0.1)


def test_a_reference_that_was_changed_while_there_was_none(model: Path, tmp_path: Path) -> None:
    """The start after the change had no KL term, and has written the newest checkpoint."""
    first = origin_of(str(model))
    write_weights(model, 1)
    start(model, first)
    second = carried_over(first, origin_of(str(model)))
    unread = carried_over(second, origin_of(str(tmp_path / "none")))
    for state in (second, unread):
        with pytest.raises(CheckpointError, match="found other weights"):
            start(model, state, kl=0.1)
    assert carried_over({}, first) == first, "of the format before nothing is known"
    write_weights(model, 0)
    start(model, second, kl=0.1)


def test_a_model_that_cannot_be_read_is_others_to_name(tmp_path: Path) -> None:
    assert print_of(str(tmp_path / "none")) is None
