"""What a resumed run says has changed since it was saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from made.configs import write_run

from sfpo_megatron.config.changes import changes
from sfpo_megatron.config.load import load_config


@pytest.fixture
def config(tmp_path: Path) -> Any:
    file = write_run(tmp_path)
    return lambda *overrides: dataclasses.asdict(load_config(file, list(overrides)))


def test_changed_settings_are_listed_but_not_those_that_do_not_matter(config: Any) -> None:
    """What was saved has been through JSON, which has no tuples."""
    then = json.loads(json.dumps(config()))
    assert list(changes(then, config())) == []
    now = config(
        "train.optimizer.lr=1e-3", "train.num_steps=7", "output_dir=s", "checkpoint.every=1",
        "data.train.0.size=5", "train.optimizer.betas=[0.9,0.99]", "trace.steps=[2]",
    )  # fmt: skip
    found = {key: (old, new) for key, old, new in changes(then, now)}
    assert found.keys() == {"train.optimizer.lr", "train.optimizer.betas", "data.train"}
    assert found["train.optimizer.lr"] == (1e-6, 1e-3)


def test_a_key_of_another_version_is_a_change(config: Any) -> None:
    then = config()
    del then["sfpo"]["alpha"]
    assert list(changes(then, config())) == [("sfpo.alpha", None, 0.8)]
