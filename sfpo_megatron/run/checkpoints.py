"""The state of a whole run on the disk: saved at safe points, continued from by the next start.

A checkpoint directory holds Megatron's tensors, the RNG of every rank and run_state.json: the
entropy gate and its window, the data cursor, the sampling seed, counters, weight_version, the best
evaluation. With async_steps, rollouts.safetensors has the next step's rollouts, which older weights
have generated. Sampling seeds are hashed from (seed, step, prompt, sample), so that the step is all
that has to be kept of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sfpo_megatron.checkpoints.manifest import write_durably
from sfpo_megatron.checkpoints.store import RUN_STATE, CheckpointError
from sfpo_megatron.config.changes import changes
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host import stopping
from sfpo_megatron.mcore import checkpoint
from sfpo_megatron.mcore.control import PeerLostError

if TYPE_CHECKING:
    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.mcore.writing import Writing
    from sfpo_megatron.run.engines import RunIO
    from sfpo_megatron.run.metrics import Totals
    from sfpo_megatron.sfpo import EntropyGate

T = TypeVar("T")


class Checkpoints:
    """Saves, resumes and stops the run. Every method but `times` is collective."""

    def __init__(
        self, config: RunConfig, policy: Policy, io: RunIO, gate: EntropyGate, totals: Totals
    ) -> None:
        self._config = config
        self._policy = policy
        self._io = io
        self._gate = gate
        self._totals = totals
        self._writing: tuple[int, Path, Writing] | None = None
        self._cleaning: threading.Thread | None = None
        self._saved_step = 0
        self._stall_s = 0.0
        self._longest_pass_s = 0.0
        here = [socket.gethostname(), os.getpid()]
        everyone = policy.control.all_gather_json(here)
        stopping.watch_peers([p for host, p in everyone if host == here[0] and p != here[1]])

    # --- resume -------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load what `io` found, engines included; the step it was saved after, 0 for a new run."""
        control, found = self._policy.control, self._io.found
        where = control.broadcast_json(
            None if found is None else [str(found.directory), found.has_run_state]
        )
        if where is None:
            return self._begin(0)
        directory, has_run_state = Path(where[0]), bool(where[1])
        begun = time.monotonic()
        if not has_run_state:
            checkpoint.load_weights(self._policy, directory)
            self._io.refit(weight_version=0)
            self._io.progress(f"weights of {directory}; the run begins anew (no {RUN_STATE} there)")
            return self._begin(0)
        checkpoint.load(self._policy, directory)
        text = (directory / RUN_STATE).read_text(encoding="utf-8") if found is not None else None
        state = json.loads(control.broadcast_json(text))
        self._gate.load_state_dict(state["gate"])
        for name, value in state["totals"].items():
            setattr(self._totals, name, value)
        self._io.load_state(state, directory)
        self._io.refit(weight_version=state["weight_version"])
        for key, then, now in changes(state["config"], dataclasses.asdict(self._config)):
            self._io.progress(f"changed since then: {key}: {then} -> {now}")
        seconds = time.monotonic() - begun
        self._io.progress(f"resumed from {directory} after step {state['step']} ({seconds:.1f} s)")
        return self._begin(int(state["step"]))

    def _begin(self, step: int) -> int:
        self._saved_step = step
        if self._io.stop is not None:
            self._io.stop.in_train_step = True  # from here on there is something to save
        return step

    # --- safe points --------------------------------------------------------------------------

    def after_step(self, step: int) -> bool:
        """Save if it is time; True if the run has been asked to stop and has been saved."""
        every, last = self._config.checkpoint.every, step == self._config.train.num_steps
        if every == 0:
            return False
        mine = [
            self._io.stop.reason if self._io.stop is not None else None,
            self._writing is None or self._writing[2].is_done,
        ]
        votes = self._policy.control.all_gather_json(mine)
        reason = votes[0][0]
        if self._writing is not None and all(is_done for _, is_done in votes):
            self._timed(self._complete)
        if last or reason or step % every == 0:
            self._timed(lambda: self._hold_and_save(step))
        if last or reason:
            self._timed(self.close)
        if reason and not last:
            self._say_goodbye(reason, step)
        return bool(reason) and not last

    def give_up(self, step: int, reason: str | None = None) -> None:
        """`step` has not changed anything yet and will not be made: save the state before it."""
        self._io.end_engines()
        if step - 1 > self._saved_step:
            self._save(step - 1)
        self.close()
        if reason is None and self._io.stop is not None:
            reason = self._io.stop.reason
        self._say_goodbye(reason or "asked to stop", step - 1)

    def guarded(self, run_pass: Callable[[], T], *, num_passes: int) -> Callable[[], T]:
        """`run_pass`, which raises OutOfTime on every rank where the step's other passes would not
        end in time for a save."""
        if self._config.checkpoint.must_save_within_s is None:
            return run_pass
        left = iter(range(num_passes, 0, -1))

        def guarded_pass() -> T:
            self._check_time(next(left) * self._longest_pass_s)
            begun = time.monotonic()
            result = run_pass()
            self._longest_pass_s = max(self._longest_pass_s, time.monotonic() - begun)
            return result

        return guarded_pass

    def _check_time(self, remaining_s: float) -> None:
        late = None
        if self._io.stop is not None:
            try:
                self._io.stop.check(remaining_s)
            except stopping.OutOfTime as error:
                late = str(error)
        late = self._policy.control.broadcast_json(late)
        if late is not None:
            self.close()  # what is being written is a state to come back to
            self._io.progress(
                f"stopped by {late}: no time to end this step within checkpoint.must_save_within_s;"
                f" the last checkpoint is of step {self._saved_step}"
            )
            raise stopping.OutOfTime(late)

    def _say_goodbye(self, reason: str, step: int) -> None:
        self._io.progress(
            f"stopped by {reason} after step {step}, saved; the same command continues (exit code "
            f"{stopping.STOPPED_EXIT_CODE})"
        )

    @property
    def times(self) -> dict[str, float]:
        """Seconds that the loop stood still for checkpoints since this was last read."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return {"time/checkpoint_s": stall_s} if stall_s else {}

    def _timed(self, action: Callable[[], None]) -> None:
        begun = time.monotonic()
        action()
        self._stall_s += time.monotonic() - begun

    # --- save ---------------------------------------------------------------------------------

    def _hold_and_save(self, step: int) -> None:
        self._io.hold()
        self._io.to_trainer()
        self._save(step)

    def _save(self, step: int) -> None:
        if self._writing is not None:
            self._complete()
        begun = time.monotonic()
        store = self._io.store
        aside = str(store.begin(step)) if store is not None else None
        directory = Path(self._policy.control.broadcast_json(aside))
        with self._explained(step, directory):
            writing = checkpoint.begin_save(
                self._policy, directory, step=step, form=self._config.checkpoint.format
            )
            if store is not None:
                text = json.dumps(self._state(step, directory), indent=1, allow_nan=False)
                write_durably(directory / RUN_STATE, text + "\n")
        self._writing = step, directory, writing
        if not self._config.checkpoint.async_save:
            self._complete()
        if self._io.stop is not None:
            self._io.stop.save_s = time.monotonic() - begun

    def _complete(self) -> None:
        """Wait for what is being written and make it the latest checkpoint."""
        assert self._writing is not None
        step, aside, writing = self._writing
        self._writing = None
        with self._explained(step, aside):
            digests = writing.finish()
            store = self._io.store
            if store is not None:
                directory = store.commit(aside, step, digests)
                if self._io.best is not None and self._io.best[0] == step:
                    store.mark_best(step)
                size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
                self._io.progress(f"checkpoint {directory} ({size / 2**20:,.0f} MiB)")
                self._clean_up()
        self._saved_step = step

    def _clean_up(self) -> None:
        """Verify the newest and remove old ones: beside the training where writing is too."""
        self._join_cleaning()
        self._cleaning = threading.Thread(target=self._prune, name="checkpoint-retention")
        self._cleaning.start()
        if not self._config.checkpoint.async_save:
            self._join_cleaning()

    def _prune(self) -> None:
        assert self._io.store is not None
        try:
            self._io.store.prune()
        except (CheckpointError, OSError) as error:
            self._io.progress(f"warning: {error}")

    def _join_cleaning(self) -> None:
        if self._cleaning is not None:
            self._cleaning.join()
            self._cleaning = None

    def close(self) -> None:
        """Bring what is being written to its end."""
        if self._writing is not None:
            self._complete()
        self._join_cleaning()

    @contextlib.contextmanager
    def _explained(self, step: int, aside: Path) -> Iterator[None]:
        """A failure inside names the step and what is left, and gives the space back."""
        try:
            yield
        except PeerLostError:
            raise
        except CheckpointError:
            if self._io.store is not None:
                self._io.store.abandon(aside)
            raise
        except Exception as error:
            free = shutil.disk_usage(aside.parent).free
            if self._io.store is not None:
                self._io.store.abandon(aside)
            kept = (
                f"that of step {self._saved_step} is kept" if self._saved_step else "none is kept"
            )
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {aside.parent}, where "
                f"{free / 2**20:,.0f} MiB were free: {error}; {kept}: free space or lower "
                "checkpoint.keep_last, then start the same command"
            ) from error

    def _state(self, step: int, directory: Path) -> dict[str, Any]:
        """run_state.json."""
        return {
            "step": step,
            "weight_version": step,
            "gate": self._gate.state_dict(),
            "totals": dataclasses.asdict(self._totals),
            "sampling": {"seed": self._config.seed},
            **self._io.save_state(directory),
            "parallel": dataclasses.asdict(self._config.parallel),
            "config": dataclasses.asdict(self._config),
        }
