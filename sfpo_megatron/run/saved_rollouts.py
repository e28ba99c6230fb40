"""Rollout batches in files: `debug.save_rollouts` and `debug.train_only`; and on their way to every
rank, which is the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfpo_megatron.host.replacing import replacing, set_aside
from sfpo_megatron.run.engineless import EnginelessFeed
from sfpo_megatron.types import RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup

_TENSORS = tuple(f.name for f in fields(RolloutBatch) if f.type == "Tensor")
_NUMBERS = tuple(f.name for f in fields(RolloutBatch) if f.type == "int")


def to_tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    """A batch as named tensors: what travels and what is saved."""
    numbers = torch.tensor([getattr(batch, name) for name in _NUMBERS])
    return {"numbers": numbers, **{name: getattr(batch, name) for name in _TENSORS}}


def from_tensors(tensors: dict[str, Tensor]) -> RolloutBatch:
    """Inverse of `to_tensors`. What was saved before batches had a response_mask was generated
    whole, so all of it is trained on."""
    everything = torch.ones(tensors["generator_logprobs"].shape, dtype=torch.bool)
    tensors = {"response_mask": everything, **tensors}
    numbers: dict[str, Any] = dict(zip(_NUMBERS, tensors["numbers"].tolist(), strict=True))
    return RolloutBatch(**numbers, **{name: tensors[name] for name in _TENSORS})


def tensors_of(step: int | str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one train step, out of several steps' named STEP.NAME."""
    prefix = f"{step}."
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


class SavedFeed(EnginelessFeed):
    """`debug.train_only`: the batches of a file that `debug.save_rollouts` wrote, by train step. It
    has no texts and no ids."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tensors = load_file(path)
        self.metrics = {"time/generate_s": 0.0, "time/reward_s": 0.0}
        self._of_engines: dict[str, Any] = {}

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """The batch that was saved as train step `step`; there is no engine to refit."""
        found = tensors_of(step, self._tensors)
        if not found:
            saved = len({name.split(".")[0] for name in self._tensors})
            raise ValueError(
                f"debug.train_only: found {saved} train steps in {self._path}, expected step "
                f"{step}; set train.num_steps={saved} or save more rollouts"
            )
        missing = {"numbers", *_TENSORS} - {"response_mask"} - found.keys()  # `from_tensors`
        if missing:
            raise ValueError(
                f"debug.train_only: found no {', '.join(sorted(missing))} for train step {step} in "
                f"{self._path}, expected what this version saves; save the rollouts again"
            )
        return from_tensors(found)

    def state_dict(self) -> dict[str, Any]:
        """How far the run had come in its prompts, which it may go on with in engines."""
        return self._of_engines

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._of_engines = {key: state[key] for key in ("prompts", "history") if key in state}


class Saver(Protocol):
    """Keeps the batches that rank 0 collects."""

    def add(self, step: int, batch: RolloutBatch) -> None: ...


class NoSaver:
    """`debug.save_rollouts` is not set."""

    def add(self, step: int, batch: RolloutBatch) -> None:
        """Keep nothing."""


class RolloutSaver:
    """`debug.save_rollouts`: every batch so far in one safetensors file, rewritten whole."""

    def __init__(self, path: str, *, up_to_step: int = 0) -> None:
        """`up_to_step`: keep what a run that is resumed has saved of its steps up to this one. What
        stands there of another is kept as NAME.previous-N."""
        self._path = Path(path)
        self._tensors: dict[str, Tensor] = {}
        if not up_to_step and self._path.exists():
            set_aside(self._path, "previous")
        if up_to_step and self._path.is_file():
            saved = load_file(self._path)
            self._tensors = {n: t for n, t in saved.items() if int(n.split(".")[0]) <= up_to_step}

    def add(self, step: int, batch: RolloutBatch) -> None:
        self._tensors.update({f"{step}.{n}": t for n, t in to_tensors(batch).items()})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as aside:
            save_file(self._tensors, aside)


def share(control: ControlGroup, batch: RolloutBatch | None) -> RolloutBatch:
    """Rank 0's batch on every rank; the others pass None. Collective."""
    tensors = control.broadcast(to_tensors(batch) if batch is not None else None)
    return from_tensors(tensors)
