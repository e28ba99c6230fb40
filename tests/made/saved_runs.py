"""Runs that save and continue, with an empty file for Megatron's part; the store is real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.checkpoints.store import Found, store_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.run import saving
from sfpo_megatron.run.checkpoints import Checkpoints
from sfpo_megatron.run.held_out import Best


class Saved:
    """A run of 5 train steps that saves every second one."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        found: Found | None = None,
        asked: str = "",
        **checkpoint: Any,
    ) -> None:
        """`found`: the checkpoint that the run continues from; `asked`: what it evaluates."""
        self.config: RunConfig = run_config(
            output_dir=str(folder),
            train={"num_steps": 5},
            checkpoint={"every": 2, "keep_last": 9, **checkpoint},
        )
        self.events: list[str] = []
        self.best = Best(asked)
        self.begun, self.took = list[bool](), list[float]()
        self.stop = SimpleNamespace(
            reason=None, steps_begin=lambda: self.begun.append(True), saved=self.took.append
        )
        self.writing = SimpleNamespace(finish=dict, is_done=True, seconds=0.0)
        self.store = store_of(self.config)
        monkeypatch.setattr(saving.checkpoint, "begin_save", self.begin_save)
        for load in ("load", "load_weights"):
            monkeypatch.setattr(saving.checkpoint, load, lambda policy, directory: None)
        control: Any = SimpleNamespace(
            rank=0,
            all_gather_json=lambda value: [value],
            broadcast_json=lambda value: value,
        )
        opened: Any = SimpleNamespace(
            start=SimpleNamespace(found=found, run_id="abcdef012345"),
            ends=SimpleNamespace(stop=self.stop, best=self.best, feed=self),
            progress=self.events.append,
            important=self.events.append,
            store=self.store,
        )
        policy: Any = SimpleNamespace(control=control)
        self.engines: Any = SimpleNamespace(
            hold=self.note("hold"),
            to_trainer=self.note("to trainer"),
            end=self.note("end"),
            refit=lambda weight_version: None,
        )
        kept: Any = {"best": self.best, "data": self}
        self.checkpoints = Checkpoints(self.config, opened, policy, self.engines, kept)

    def note(self, event: str) -> Callable[..., None]:
        return lambda *step: self.events.append(event)

    def hand_back(self, step: int) -> None:
        self.events.append(f"hand back {step}")

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def begin_save(self, policy: Any, directory: Path, *, step: int, form: str) -> Any:
        self.events.append(f"save {step}")
        (directory / "metadata.json").write_text("{}")
        return self.writing


def continued(run: Saved, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Saved:
    """The next start of `run`, from its newest checkpoint."""
    (step, directory), *_ = reversed(run.store.steps().items())
    found = Found(directory=directory, step=step, has_run_state=True)
    again = Saved(folder, monkeypatch, found=found, **more)
    assert again.checkpoints.resume() == step
    return again
