"""Actors on a cluster that RAY_ADDRESS names run in another directory: what they are told of files.

Not exercised: Ray (tests/e2e/test_two_nodes.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from made.configs import run_config

from sfpo_megatron.config.tree import ModelConfig, RunConfig
from sfpo_megatron.rollout import controller
from sfpo_megatron.rollout.placement import Node


@pytest.mark.parametrize("model", ["models/m", "owner/name"])
def test_relative_paths_are_absolute_for_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    made: list[tuple[RunConfig, partial[object]]] = []

    def client(config: RunConfig, spawn: partial[object], *, owns_cluster: bool) -> None:
        made.append((config, spawn))

    here = Node(id="n", address="host", devices=())
    monkeypatch.setattr(controller, "start_cluster", lambda: True)
    monkeypatch.setattr(controller, "nodes", lambda is_ours: [here])
    monkeypatch.setattr(controller, "RolloutClient", client)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    relative = replace(run_config(), model=ModelConfig(path=model))
    controller.start_rollouts(relative, model_path=model)
    ((config, spawn),) = made
    expected = model if model == "owner/name" else f"{tmp_path}/{model}"
    assert (config.model.path, spawn.keywords["model_path"]) == (expected, expected)
    assert config.output_dir == f"{tmp_path}/{relative.output_dir}"
    assert config in spawn.args, "the actor is made with what the client has"
