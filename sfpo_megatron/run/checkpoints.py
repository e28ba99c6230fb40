"""The state of a whole run on the disk: saved at safe points, continued from by the next start.

run_state.json holds the state of everything `kept` (the entropy gate and its window, the data
cursor, counters, the best evaluation), the sampling seed and weight_version. With async_steps,
rollouts.safetensors has the next step's rollouts, which older weights have generated. Sampling
seeds are hashed from (seed, step, prompt, sample), so that the step is all that has to be kept of
them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sfpo_megatron.checkpoints.identity import FORMAT, Kind
from sfpo_megatron.checkpoints.store import RUN_STATE
from sfpo_megatron.config.changes import changes
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import span
from sfpo_megatron.mcore import checkpoint
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE, OutOfTime, StopRun
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run import same_model
from sfpo_megatron.run.engines import Engines, NoEngines
from sfpo_megatron.run.opening import OpenedRun
from sfpo_megatron.run.saving import (
    ROLLOUTS,
    CheckpointWriter,
    Stateful,
    read_rollouts,
    read_run_state,
)
from sfpo_megatron.run.together import begin_together

T = TypeVar("T")


class Checkpoints:
    """Saves, resumes and stops the run. Methods are collective where nothing else is said."""

    def __init__(
        self,
        config: RunConfig,
        opened: OpenedRun,
        policy: Policy,
        engines: Engines | NoEngines,
        kept: Mapping[str, Stateful],
        *,
        kind: Kind = "train",
    ) -> None:
        """`kept`: key of run_state.json -> what it is the state of. `kind`: the run's command."""
        self._config = config
        self._policy, self._control = policy, policy.control
        self._engines = engines
        self._kept, self._kind = kept, kind
        self._found, self._run_id = opened.start.found, opened.start.run_id
        self._stop, self._feed = opened.ends.stop, opened.ends.feed
        self._progress, self._important = opened.progress, opened.important
        self._writer = CheckpointWriter(
            config.checkpoint,
            policy,
            opened.store,
            best=opened.ends.best,
            took=self._stop.saved,
            progress=opened.progress,
            warn=opened.important,
        )
        self._origin = same_model.origin_of(config.model.path) if policy.control.rank == 0 else {}
        self._resumed_step = 0
        self._stall_s, self._longest_pass_s = 0.0, 0.0
        begin_together(policy.control)

    # --- resume -------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the checkpoint that the run continues from, engines included; the step it was saved
        after, 0 for a new run."""
        with span("resume"):
            step = self._load()
        self._resumed_step = step
        self._writer.resumed(step)
        self._stop.steps_begin()  # from here on there is something to save
        return step

    def _load(self) -> int:
        if self._found is None:
            return 0
        directory, begun = self._found.directory, time.monotonic()
        if not self._found.has_run_state:
            checkpoint.load_weights(self._policy, directory)
            self._engines.refit(weight_version=0)
            self._origin[same_model.BEGAN_FROM] = str(directory)
            self._progress(f"weights of {directory}; the run begins anew ({_why_anew(directory)})")
            return 0
        checkpoint.load(self._policy, directory)
        is_main = self._control.rank == 0
        state = self._control.broadcast_json(read_run_state(directory) if is_main else None)
        if is_main:
            state["data"][ROLLOUTS] = read_rollouts(directory)
        for name, part in self._kept.items():
            part.load_state_dict(state.get(name))  # versions before had fewer parts
        self._origin = same_model.carried_over(state, self._origin)
        self._engines.refit(weight_version=state["weight_version"])
        for key, then, now in changes(state["config"], dataclasses.asdict(self._config)):
            self._progress(f"changed since then: {key}: {then} -> {now}")
        self._stop.saved(seconds := time.monotonic() - begun)  # a guess, until there is a save
        self._progress(f"resumed from {directory} after step {state['step']} ({seconds:.1f} s)")
        return int(state["step"])

    # --- safe points --------------------------------------------------------------------------

    def after_step(self, step: int, *, is_last: bool = False) -> bool:
        """Save if it is time; True if the run has been asked to stop and has been saved. `is_last`:
        the run ends here by itself. StopRun if its engines are lost for good."""
        every, last = self._config.checkpoint.every, is_last
        if every == 0 or (last and step == self._writer.saved_step > 0):  # continued from there
            return False
        votes = self._control.all_gather_json((self._stop.reason, self._writer.is_done))
        reason = votes[0][0]
        if self._writer.is_writing and all(is_done for _, is_done in votes):
            self._timed(self._writer.complete)
        if last or reason or step % every == 0:
            self._timed(lambda: self._hold_and_save(step))
        if last or reason:
            self._timed(self._writer.close)
        if reason and not last:
            self._say_goodbye(reason, step)
        return bool(reason) and not last

    def evaluated(self, step: int) -> None:
        """Note that the run has evaluated the step that it continued after. Not collective."""
        self._writer.evaluated(step)

    def save_now(self, step: int) -> None:
        """Save what is whole after train step `step`, for a run that ends with an error."""
        if self._config.checkpoint.every:
            try:
                self._hold_and_save(step)
            except StopRun:  # of the engines; the error is the reason to end
                self._engines.end()
                self._save(step)
            self._writer.close()

    def give_up(self, stop: StopRun) -> None:
        """End the run before a step that is not made, saved if the state before it is whole. Where
        this start has nothing new to save, engines that are lost for good are its failure: raised
        again, on every rank."""
        if isinstance(stop.__cause__, FleetLost) and stop.step - 1 == self._resumed_step:
            raise stop.__cause__
        if stop.begun:
            self._writer.close()  # what is being written is a state to come back to
            self._important(
                f"stopped by {stop}: no time to end this step within checkpoint.must_save_within_s;"
                f" the last checkpoint is of step {self._writer.saved_step}"
            )
            return
        self._engines.end()
        if stop.step - 1 > self._writer.saved_step:
            self._save(stop.step - 1)
        self._writer.close()
        if self._writer.saved_step == stop.step - 1 > 0:
            self._say_goodbye(str(stop), stop.step - 1)
        else:
            self._important(f"stopped by {stop} before the first train step: nothing to save")

    def guarded(self, run_pass: Callable[[], T], *, step: int, num_passes: int) -> Callable[[], T]:
        """`run_pass`, which raises StopRun on every rank if the step's other passes would not end
        in time for a save."""
        if self._config.checkpoint.must_save_within_s is None:
            return run_pass
        left = iter(range(num_passes, 0, -1))

        def guarded_pass() -> T:
            self._check_time(num_left := next(left), step, is_first=num_left == num_passes)
            begun = time.monotonic()
            result = run_pass()
            self._longest_pass_s = max(self._longest_pass_s, time.monotonic() - begun)
            return result

        return guarded_pass

    def _check_time(self, num_passes: int, step: int, *, is_first: bool) -> None:
        late = None
        if self._control.rank == 0:
            try:
                self._stop.check(num_passes * self._longest_pass_s)
            except OutOfTime as error:
                late = str(error)
        late = self._control.broadcast_json(late)
        if late is not None:
            if is_first:
                self._feed.hand_back(step)
            raise StopRun(late, step=step, begun=not is_first)

    def _say_goodbye(self, reason: str, step: int) -> None:
        self._important(
            f"stopped by {reason} after step {step}, saved; the same command continues (exit code "
            f"{STOPPED_EXIT_CODE})"
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
        self._engines.hold(step)
        self._engines.to_trainer()
        self._save(step)

    def _save(self, step: int) -> None:
        with doing("save"):
            self._writer.write(step, lambda: self._state(step))

    def _state(self, step: int) -> dict[str, Any]:
        """The content of run_state.json."""
        return {
            "format": FORMAT,
            "run_id": self._run_id,
            "kind": self._kind,
            "step": step,
            "weight_version": step,
            **{name: part.state_dict() for name, part in self._kept.items()},
            **self._origin,
            "sampling": {"seed": self._config.seed},
            "parallel": dataclasses.asdict(self._config.parallel),
            "config": dataclasses.asdict(self._config),
        }


def _why_anew(checkpoint: Path) -> str:
    other = (checkpoint / RUN_STATE).exists()  # sft's, for train, or the other way
    return "that of another command's run" if other else f"no {RUN_STATE} there"
