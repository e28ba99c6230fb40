"""The rollout engines as the loop uses them: batches out of them, weights into them.

Rank 0 talks to them; on the other ranks the same calls run, with null objects where rank 0 has its
ends, and help where all ranks are needed. Every method is collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.spans import span
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.offload import Offload
from sfpo_megatron.outputs.stopping import OutOfTime, StopRun
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run.device_turns import DeviceTurns, NoTurns, Turns
from sfpo_megatron.run.ends import MainEnds, WeightSender
from sfpo_megatron.run.held_out import is_due
from sfpo_megatron.run.saved_rollouts import share
from sfpo_megatron.run.together import Together
from sfpo_megatron.tracking.details import Details
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.types import RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.rollout.engine import Memory


class NoEngines:
    """A warm start has no engines."""

    def refit(self, *, weight_version: int) -> None:
        """There is nobody to send weights to."""

    def hold(self, step: int) -> None:
        """Nothing is begun ahead."""

    def to_trainer(self) -> None:
        """The devices are the trainer's."""

    def end(self) -> None:
        """There is nothing to end."""


class Engines:
    """Batches out of the engines, weights into them."""

    def __init__(
        self,
        config: RunConfig,
        ends: MainEnds,
        control: ControlGroup,
        refit: WeightSender,
        offload: Offload,
    ) -> None:
        self._config = config
        self._ends = ends
        self._control = control
        self._refit = refit
        self._together = Together(control)
        self._turns: DeviceTurns = NoTurns()
        if is_colocated(config):
            self._turns = Turns(offload, control, sleep=self._sleep, wake=self._wake)
        self._weight_version = 0
        self._lost: FleetLost | OutOfTime | None = None
        """Why there is no next train step, once that is known; this one is ended first."""

    # --- batches ------------------------------------------------------------------------------

    def collect(self, step: int) -> RolloutBatch:
        """The step's rollouts, on every rank. Raises StopRun if the run ends before the step: there
        is no time for its rollouts, or the engines are lost for good."""
        with self._before(step):
            self._to_engines()
            with span("collect"), self._ends.polling():
                batch = self._together.run(partial(self._ends.feed.collect, step), self._resend)
        shared = share(self._control, batch)
        self._ends.saver.add(step, shared)
        return shared

    @contextmanager
    def _before(self, step: int) -> Iterator[None]:
        """StopRun in place of what ends the run before train step `step`, which can be saved."""
        try:
            if self._lost is not None:
                raise self._lost
            yield
        except OutOfTime as error:
            raise StopRun(str(error), step=step, begun=False) from error
        except FleetLost as error:
            if not self._config.saves_state:
                raise
            raise StopRun(str(error), step=step, begun=False) from error

    def hold(self, step: int) -> None:
        """Take in the rollouts that were begun ahead, for the checkpoint after train step `step`.
        StopRun as from `collect` of the next."""
        if self._config.rollout.async_steps:
            with self._before(step + 1), self._ends.polling():
                self._together.run(self._ends.feed.hold, self._resend)

    def evaluate(self, *, step: int) -> None:
        """Held-out accuracy of the weights after train step `step` into the metrics. StopRun as
        from `collect` of the next."""
        if self._config.debug.train_only or not self._config.data.eval:
            return
        timers = Timers()
        with self._before(step + 1):
            self._to_engines()
            with timers("evaluate"), self._ends.polling():
                metrics = self._together.run(partial(self._ends.evaluation, step), self._resend)
        if metrics is not None:  # on rank 0
            self._ends.tracker.log(metrics | timers.take())
            self._ends.best.observe(step, metrics.get("eval/average", metrics["eval/accuracy"]))

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the run that was saved after train step `step` had no time to evaluate it. The
        same on all ranks once they have resumed. Not collective."""
        return is_due(self._config, step) and self._ends.best.value_at(step) is None

    def evaluate_if_due(self, step: int) -> bool:
        """Evaluate after train step `step` if it is time; whether the run is over."""
        if not is_due(self._config, step):
            return False
        try:
            self.evaluate(step=step)
        except FleetLost as error:  # of a run that saves nothing: its training would be lost
            if step < self._config.train.steps:
                raise
            self.end()
            self._ends.tracker.important(
                f"warning: {error}; the evaluation after step {step}, the last, is missing"
            )
        return self.is_over(step)

    def is_over(self, step: int) -> bool:
        """Whether train step `step` was the last, or an evaluation has reached eval.stop_at."""
        return self._is_at_target() or step >= self._config.train.steps

    def _is_at_target(self) -> bool:
        target, best = self._config.eval.stop_at, self._ends.best
        if target is None:
            return False
        own = best.value is not None and best.value >= target
        reached = bool(self._control.broadcast_json(own))
        if reached and best.value is not None:  # on rank 0
            self._ends.tracker.important(
                f"held-out accuracy {best.value:.3f} after step {best.step} has reached "
                f"eval.stop_at={target:g}: the run ends here"
            )
        return reached

    # --- weights and devices ------------------------------------------------------------------

    def take_weights(self, step: int, timers: Timers) -> None:
        """Send the weights after train step `step`, once the rollouts of the next, which
        async_steps has begun, need no engine any more. Engines that are lost for good, or a stop
        request without time, end the run at its next turn: the step is whole, and has yet to be
        counted and logged."""
        try:
            with timers("wait"), self._ends.polling():
                if self._config.rollout.async_steps:
                    self._together.run(lambda ask: self._ends.feed.wait_generated(), self._resend)
            with timers("refit"):
                self.refit(weight_version=step)
        except (FleetLost, OutOfTime) as error:
            self._lost = error

    def refit(self, *, weight_version: int) -> None:
        """Send the weights to all engines; the devices are theirs then."""
        self._weight_version = weight_version
        with self._turns.to_engines():
            self._refit.send(weight_version)

    def _resend(self) -> None:
        """Send the weights again, to engines that were restarted."""
        with self._ends.fleet.polling(lambda: None):  # nothing may leave the collectives below
            self._turns.to_trainer()  # no engine can generate: they all lie idle
            with self._turns.to_engines():
                self._refit.send(self._weight_version, only_stale=True)

    def to_trainer(self) -> None:
        """Give the devices to the trainer, before its weights are used."""
        self._turns.to_trainer()

    def _to_engines(self) -> None:
        if not self._turns.is_engines:
            self.refit(weight_version=self._weight_version)

    def end(self) -> None:
        """End colocated engines early, because only a save is left to do."""
        self._turns.end_engines(self._ends.fleet.close)

    def _sleep(self) -> None:
        self._together.run(lambda ask: self._ends.fleet.sleep())

    def _wake(self, memory: Memory) -> None:
        self._together.run(lambda ask: self._ends.fleet.wake(memory))

    def details(self, step: int, batch: RolloutBatch) -> Details:
        """What the sinks get of the step's rollouts besides metrics; samples on rank 0 only. Not
        collective."""
        distributions = {
            "reward": batch.rewards.tolist(),
            "response_tokens": batch.trained_lengths.tolist(),
        }
        return Details(step=step, distributions=distributions, samples=self._ends.feed.samples)

    @property
    def metrics(self) -> dict[str, float]:
        """Seconds, age, drops and restarts of the last batch (rank 0), and this rank's moves. Not
        collective."""
        return {**self._ends.feed.metrics, **self._turns.times}


def is_colocated(config: RunConfig) -> bool:
    """Whether trainer and engines take turns on the same devices."""
    return config.rollout.placement == "colocated" and config.debug.train_only is None
