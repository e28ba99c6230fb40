"""Which config.json goes with a checkpoint: that of the run that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made.models import TINY

from sfpo_megatron.checkpoints.remembered_shape import remembered
from sfpo_megatron.checkpoints.store import RUN_STATE, CheckpointError
from sfpo_megatron.convert.locate import Located, companions_of
from sfpo_megatron.families.shape import model_shape


def make_model(folder: Path, rope_theta: float) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, "rope_theta": rope_theta}))
    return folder


class Run:
    """RUN with a checkpoint of an earlier run of `then`, which a new run of `now` has set aside."""

    def __init__(self, path: Path, *, then: Path, now: Path) -> None:
        checkpoint = path / "checkpoints.previous-1/step_0000050"
        checkpoint.mkdir(parents=True)
        shape = remembered(model_shape(json.loads((then / "config.json").read_text())))
        state = {"config": {"model": {"path": str(then)}}, "model": {"shape": shape}}
        (checkpoint / RUN_STATE).write_text(json.dumps(state))
        (path / "config.yaml").write_text(f"model: {{path: {now}}}\n")
        self.found = Located(kind="native", directory=checkpoint)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two of the same sizes: every tensor of one fits the other."""
    return make_model(tmp_path / "math", 1e4), make_model(tmp_path / "plain", 1e6)


def test_the_model_of_the_run_that_wrote_it(tmp_path: Path, models: tuple[Path, Path]) -> None:
    then, now = models
    found, shape = companions_of(Run(tmp_path / "run", then=then, now=now).found, None)
    assert (found, shape.rope_base) == (then, 1e4)


def test_a_model_that_has_moved(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """It is taken from where the newest start of the run found it, if it is the same."""
    then, _ = models
    run = Run(tmp_path / "run", then=then, now=tmp_path / "moved")
    then.rename(tmp_path / "moved")
    assert companions_of(run.found, None)[0] == tmp_path / "moved"
    (tmp_path / "moved").rename(tmp_path / "moved again")
    with pytest.raises(CheckpointError, match=r"config.yaml: found model.path .*moved' without"):
        companions_of(run.found, None)
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(CheckpointError, match=f"{RUN_STATE}: found model.path .*math' without"):
        companions_of(run.found, None)


@pytest.mark.parametrize("given", [True, False])
def test_another_model_is_refused(tmp_path: Path, models: tuple[Path, Path], given: bool) -> None:
    """It was changed in its place, or is another that `--hf` names."""
    then, now = models
    run = Run(tmp_path / "run", then=then, now=now)
    if not given:
        (then / "config.json").write_text((now / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"found rope_base 1000000.0, expected 10000.0 as"):
        companions_of(run.found, now if given else None)


@pytest.mark.parametrize("state", ["", "[]", '{"config": 1, "model": [2]}'])
def test_a_run_state_that_says_nothing(
    tmp_path: Path, models: tuple[Path, Path], state: str
) -> None:
    """It is broken, or of a version before: the weights can be read all the same."""
    then, now = models
    run = Run(tmp_path / "run", then=then, now=now)
    (run.found.directory / RUN_STATE).write_text(state)
    assert companions_of(run.found, None)[0] == now
