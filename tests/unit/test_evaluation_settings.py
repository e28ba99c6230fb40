"""What the records of an evaluation are held to: all that changes a rollout or its score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.config.reward import HttpRewardConfig
from sfpo_megatron.evaluate import settings_of
from sfpo_megatron.evaluation.models import Model
from sfpo_megatron.types import Prompt

ROW: dict[str, Any] = {"id": "a/0", "text": "q", "token_ids": (1, 2), "question": "q"}


def settings(folder: Path, metadata: dict[str, Any], **sections: Any) -> dict[str, Any]:
    prompts = [Prompt(**ROW, answer="B", metadata=metadata)]
    found = settings_of(Model(name="m", hf=folder), run_config(**sections), prompts)
    return json.loads(json.dumps(found))


CHANGES: dict[str, dict[str, Any]] = {
    "quantization": {"rollout": {"quantization": "fp8_per_channel"}},
    "engine_args": {"rollout": {"engine_args": {"enforce_eager": True}}},
    "environment": {"rollout": {"environment": "math_tool"}},
    "environment_args": {"rollout": {"environment_args": {"max_turns": 2}}},
    "reward_timeout_s": {"reward": {"timeout_s": 9.0}},
    "reward_url": {"reward": {"http": HttpRewardConfig(url="http://localhost:1/score")}},
    "batched": {"reward": {"function": "my.own:reward", "batched": True}},
    "metadata": {},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_a_figure_is_recorded(tmp_path: Path, name: str) -> None:
    base: dict[str, Any] = {"reward": {"function": "my.own:reward"}} if name == "batched" else {}
    before = settings(tmp_path, {"choices": ["x", "y"]}, **base)
    choices = ["y", "x"] if name == "metadata" else ["x", "y"]
    after = settings(tmp_path, {"choices": choices}, **CHANGES[name])
    assert {key for key in before if before[key] != after[key]} == {name}


def test_metadata_that_json_cannot_hold_is_the_same_in_every_start(tmp_path: Path) -> None:
    first, second = (settings(tmp_path, {"entry": object(), "n": 1}) for _ in range(2))
    assert first == second != settings(tmp_path, {"entry": object(), "n": 2})
