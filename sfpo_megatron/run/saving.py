"""How one checkpoint is written, beside the training where that is asked for, and read again.

A checkpoint directory holds Megatron's tensors, the RNG of every rank and run_state.json; a
mapping of tensors in a `Stateful`'s state has a file of its own, NAME.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file, save_file

from sfpo_megatron.checkpoints.store import RUN_STATE, CheckpointError, CheckpointStore, step_of
from sfpo_megatron.config.checkpoint import CheckpointConfig
from sfpo_megatron.host.peers import PeerLostError
from sfpo_megatron.host.replacing import write_durably
from sfpo_megatron.mcore import checkpoint
from sfpo_megatron.run.held_out import Best

if TYPE_CHECKING:
    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.mcore.writing import Writing

ROLLOUTS = "rollouts"
"""The entry of a state that is a mapping of tensors."""


class Stateful(Protocol):
    """Something whose state goes into every checkpoint."""

    def state_dict(self) -> Any:
        """Plain values, as JSON has them; an entry `rollouts` may be a mapping of tensors."""

    def load_state_dict(self, state: Any) -> None:
        """Continue at a saved state."""


def write_run_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write run_state.json, and the tensors that are part of it."""
    plain = dict(state)
    for name, part in state.items():
        if isinstance(part, dict) and ROLLOUTS in part:
            plain[name] = {key: value for key, value in part.items() if key != ROLLOUTS}
            if part[ROLLOUTS]:
                save_file(part[ROLLOUTS], directory / f"{ROLLOUTS}.safetensors")
    text = json.dumps(plain, indent=1, allow_nan=False)
    write_durably(directory / RUN_STATE, text + "\n")


def read_run_state(directory: Path) -> dict[str, Any]:
    """run_state.json of a checkpoint, without its tensors."""
    state: dict[str, Any] = json.loads((directory / RUN_STATE).read_text(encoding="utf-8"))
    return state


def evaluated(directory: Path, asked: str) -> float | None:
    """What an evaluation that `asked` the same has found at a checkpoint's step; else None."""
    best = Best(asked)
    try:
        state = read_run_state(directory)
        best.load_state_dict(state.get("best"))
    except (OSError, ValueError):  # one that is gone, or has been broken since
        return None
    return best.value_at(state["step"])


def read_rollouts(directory: Path) -> dict[str, Any]:
    """The tensors of `write_run_state`; none where nothing had been begun ahead."""
    file = directory / f"{ROLLOUTS}.safetensors"
    return load_file(file) if file.exists() else {}


@dataclass(kw_only=True, frozen=True, slots=True)
class _Written:
    """A checkpoint that is on its way to the disk."""

    step: int
    aside: Path
    writing: Writing
    copy_s: float
    """How long the run stood still for it."""


class CheckpointWriter:
    """Writes one checkpoint after the other. Methods are collective."""

    def __init__(
        self,
        config: CheckpointConfig,
        policy: Policy,
        store: CheckpointStore,
        *,
        best: Best,
        took: Callable[[float], None],
        progress: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """`best`: the run's evaluations so far. `took(seconds)`: hears on rank 0 how long the last
        checkpoint took, beside the training or not."""
        self._config = config
        self._policy = policy
        self._store = store
        self._best, self._took = best, took
        best.asked = policy.control.broadcast_json(best.asked)  # all ranks decide alike by it
        self._written_s = self._pruned_s = 0.0
        self._progress, self._warn = progress, warn
        self._is_main = policy.control.rank == 0
        self._under_way: list[_Written] = []  # one at the most
        self._cleaning: list[threading.Thread] = []  # likewise
        self.saved_step = 0
        """Train step of the newest checkpoint that is whole, or that the run continued from."""

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return bool(self._under_way)

    @property
    def is_done(self) -> bool:
        """Whether this rank has written all that it has to. Not collective."""
        return all(written.writing.is_done for written in self._under_way)

    def write(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Begin the checkpoint of `step`, and wait for it unless checkpoint.async_save. `state()`:
        what run_state.json holds, asked for on rank 0."""
        self.complete()
        begun = time.monotonic()
        aside = str(self._store.begin(step)) if self._is_main else None
        directory = Path(self._policy.control.broadcast_json(aside))
        with self._explained(step, directory):
            writing = checkpoint.begin_save(
                self._policy, directory, step=step, form=self._config.format
            )
            if self._is_main:
                write_run_state(directory, state())
        copy_s = time.monotonic() - begun
        self._under_way = [_Written(step=step, aside=directory, writing=writing, copy_s=copy_s)]
        if not self._config.async_save:
            self.complete()

    def complete(self) -> None:
        """Wait for what is being written and make it the latest checkpoint."""
        written, self._under_way = self._under_way, []
        for one in written:
            with self._explained(one.step, one.aside):
                digests = one.writing.finish()
                if self._is_main:
                    begun = time.monotonic()
                    directory = self._store.commit(one.aside, one.step, digests)
                    self._mark_if_best(directory)
                    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
                    self._progress(f"checkpoint {directory} ({size / 2**20:,.0f} MiB)")
                    commit_s = time.monotonic() - begun
                    self._join_cleaning()
                    self._written_s = one.copy_s + one.writing.seconds + commit_s
                    self._took(self._written_s + self._pruned_s)
                    self._clean_up()
            self.saved_step = one.step

    def resumed(self, step: int) -> None:
        """Note that the run goes on after train step `step`, 0 for a new one. Not collective."""
        self.saved_step = step
        if self._best.has_forgotten:
            self._progress("evaluations before asked something else: none counts as the best")
        self.evaluated(step)  # a kill may have come between its checkpoint and the mark

    def evaluated(self, step: int) -> None:
        """Mark the checkpoint of train step `step` if its evaluation is known by now, and is the
        best: a stop had cut it off, or a kill the mark. Not collective."""
        directory = self._store.steps().get(step) if self._is_main else None
        if directory is not None:  # else it is another run's, which this one began from
            self._mark_if_best(directory)

    def _mark_if_best(self, directory: Path) -> None:
        """Mark this checkpoint if it is better than the one that is marked, or the best that is
        there if none is: the best evaluation of all may have been at a step that was not saved."""
        marked = self._store.best  # None also where that has broken
        paths = self._store.steps().values() if marked is None else (marked, directory)
        values = {path: v for path in paths if (v := self._value_of(path)) is not None}
        if values:
            best = max(values, key=lambda path: values[path])  # the first of equals
            if best != marked:
                self._store.mark_best(best)
            # Also where an earlier start has set the mark, which a kill then made this one forget.
            self._best.marked = step_of(best), values[best]

    def _value_of(self, directory: Path) -> float | None:
        """What was found at a checkpoint, by the checkpoint itself or later."""
        later = self._best.value_at(step_of(directory))
        return later if later is not None else evaluated(directory, self._best.asked)

    def close(self) -> None:
        """Bring what is being written to its end."""
        self.complete()
        self._join_cleaning()

    def _clean_up(self) -> None:
        """Verify the newest and remove old ones: beside the training where writing is too."""
        self._join_cleaning()
        thread = threading.Thread(target=self._prune, name="checkpoint-retention")
        self._cleaning = [thread]
        thread.start()
        if not self._config.async_save:
            self._join_cleaning()

    def _prune(self) -> None:
        begun = time.monotonic()
        try:
            self._store.prune()
        except (CheckpointError, OSError) as error:
            self._warn(f"warning: {error}")
        self._pruned_s = time.monotonic() - begun
        self._took(self._written_s + self._pruned_s)

    def _join_cleaning(self) -> None:
        threads, self._cleaning = self._cleaning, []
        for thread in threads:
            thread.join()

    @contextlib.contextmanager
    def _explained(self, step: int, aside: Path) -> Iterator[None]:
        """A failure inside names the step and what is left, and gives the space back."""
        try:
            yield
        except PeerLostError:
            raise
        except CheckpointError:
            self._abandon(aside)
            raise
        except Exception as error:
            free = shutil.disk_usage(aside.parent).free
            self._abandon(aside)
            kept = f"that of step {self.saved_step} is kept" if self.saved_step else "none is kept"
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {aside.parent}, where "
                f"{free / 2**20:,.0f} MiB were free: {error}; {kept}: free space or lower "
                "checkpoint.keep_last, then start the same command"
            ) from error

    def _abandon(self, aside: Path) -> None:
        if self._is_main:
            self._store.abandon(aside)
