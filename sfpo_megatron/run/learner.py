"""The learning side of a train step, before and after its `sfpo_step`.

prepare     cut the batch, old_logprobs, ref_logprobs, K by the gate
sfpo_step   in trainer.py; one tick of the schedule before the first pass
observe     the gate sees the entropy of the slow correction
metrics     the step's line in metrics.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from sfpo_megatron.batching import set_advantages
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.gate import EntropyGate
from sfpo_megatron.mcore.batches import advantages, cut
from sfpo_megatron.mcore.passes import (
    PassResult,
    compute_logprobs,
    run_pass,
    set_old_logprobs,
    take_generator_logprobs,
)
from sfpo_megatron.mcore.reference_policy import ReferencePolicy, rollout_kl
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.run.agreement import Agreement, GeneratorDisagrees
from sfpo_megatron.run.collapse import Collapse, RunCollapsed, loss_scale_of
from sfpo_megatron.run.metrics import (
    Totals,
    batch_metrics,
    logprob_difference,
    pass_metrics,
    prediction_metrics,
    rank_metrics,
    split_metrics,
)
from sfpo_megatron.run.slow_snapshot import slow_snapshot
from sfpo_megatron.run.speed import Speed
from sfpo_megatron.snapshots.predicted import Scales
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.types import Minibatch, RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup


@dataclass(kw_only=True, frozen=True, slots=True)
class Prepared:
    """A train step that is ready for its passes."""

    step: int
    batch: RolloutBatch
    minibatches: list[Minibatch]
    num_fast: int
    """Fast passes of this step: K, or 2 of a predicted trajectory; 0 once the gate has closed."""
    one_pass: Callable[[], PassResult]
    """`run_pass` bound to its arguments."""


class Learner:
    """Holds what outlives a train step: reference, snapshot, gate, counts. Methods are collective
    where nothing else is said."""

    def __init__(self, config: RunConfig, policy: Policy, objective: PolicyObjective) -> None:
        self._config = config
        self._policy = policy
        self._objective = objective
        self._temperature = config.rollout.temperature
        kl = config.objective.kl
        # After the weights are loaded and before a checkpoint is: it keeps the initial weights.
        self._references = [ReferencePolicy(policy)] if kl.coef > 0 else []
        self._scales = Scales()
        self.snapshot = slow_snapshot(config, policy, self._scales)
        self.gate = EntropyGate.of(config.sfpo)
        self._said_flat = False
        self.totals = Totals()
        self._agreement = Agreement(config)
        self.collapse = Collapse(config.train)
        self._speed = Speed(config, policy)

    def prepare(self, step: int, batch: RolloutBatch, timers: Timers) -> Prepared:
        """Fix everything that all passes of the step share."""
        config, policy = self._config, self._policy
        minibatches = cut(config, policy, batch)
        self._set_old_logprobs(minibatches, timers)
        for reference in self._references:
            with timers("reference"):
                reference.set_ref_logprobs(minibatches, temperature=self._temperature)
        if config.objective.kl.in_reward:
            penalty = rollout_kl(policy, minibatches, batch.num_rollouts, config.objective.kl)
            set_advantages(minibatches, advantages(config, batch, penalty))
        num_fast = fast_passes(config, policy.control, self.gate, step)
        policy.control.agree(step=step, num_fast=num_fast, minibatches=len(minibatches))
        numbers = count(1)

        def one_pass() -> PassResult:
            number = next(numbers)
            if number == 1:
                # One tick a rollout batch, whatever K is; not before this: a run that stops short
                # of the first pass is saved as it was after the step before.
                policy.scheduler.step(increment=1)
            with timers("passes", number=number, of=num_fast + 1):
                return run_pass(policy, minibatches, self._objective)

        return Prepared(
            step=step, batch=batch, minibatches=minibatches, num_fast=num_fast, one_pass=one_pass
        )

    def _set_old_logprobs(self, minibatches: Sequence[Minibatch], timers: Timers) -> None:
        """Fix those of all minibatches that the first pass's own first forward does not yield."""
        rest = minibatches[1:] if self._objective.first_pass_is_old else minibatches
        if self._config.objective.old_logprobs == "generator":
            take_generator_logprobs(rest)
        elif rest:
            with timers("logprob"):
                old = compute_logprobs(self._policy, rest, temperature=self._temperature)
                set_old_logprobs(rest, old)

    def _compared(self, minibatches: list[Minibatch]) -> list[Minibatch]:
        """Those whose `old_logprobs` are the trainer's, to compare the generator's with."""
        return (
            minibatches[:1] if self._config.objective.old_logprobs == "generator" else minibatches
        )

    def observe(self, results: Sequence[PassResult]) -> None:
        """Show the gate the entropy of the slow correction, the last result, unless there is none
        that is finite (`check` counts such steps). Not collective."""
        entropy = results[-1].mean(lambda m: m.entropy)
        if math.isfinite(entropy):
            self.gate.observe(entropy)

    def metrics(
        self,
        prepared: Prepared,
        results: Sequence[PassResult],
        timers: Timers,
        engines: Mapping[str, float],
    ) -> dict[str, float]:
        """The step's metrics, but for those of checkpoints; `engines`: what is known of the
        rollouts' side."""
        totals, minibatches = self.totals, prepared.minibatches
        times = _phase_times(timers)
        metrics = {
            **batch_metrics(prepared.batch, totals),
            **pass_metrics(results, totals),
            **times,
            **engines,
        }
        mismatch = logprob_difference(self._policy, self._compared(minibatches))
        if self._objective.first_pass_is_old and len(minibatches) == 1:  # to itself it would be 0
            metrics["ppo_kl_first_pass"] = mismatch["generator_kl"]
        if self._config.sfpo.trajectory == "predicted" and prepared.num_fast:
            metrics |= prediction_metrics(self._policy.control, self._scales)
        return {
            "step": prepared.step,
            **metrics,
            **split_metrics(minibatches),
            **mismatch,
            **self._speed.of(prepared.batch, metrics),
            # `engines` has the moves of colocated turns.
            **rank_metrics(self._policy.control, {**times, **engines}, timers.take_peaks()),
            "sfpo_active": prepared.num_fast > 0,
            "weight_version": prepared.step,
            "lr": self._policy.optimizer.param_groups[0]["lr"],
        }

    def check(
        self,
        prepared: Prepared,
        results: Sequence[PassResult],
        metrics: Mapping[str, float],
        *,
        prompt_ids: Sequence[str],
        warn: Callable[[str], None],
        save: Callable[[int], None],
    ) -> None:
        """Look whether the run still makes sense: generator against trainer by the step's `metrics`
        (`agreement.Agreement`; `prompt_ids`: the batch's, on rank 0), then the limits of section
        train (`collapse.Collapse`). Raises GeneratorDisagrees or RunCollapsed on every rank, after
        a `save` of the step."""
        step, batch = prepared.step, prepared.batch
        compared = self._compared(prepared.minibatches)
        found = self._agreement.judge(self._policy, step, batch, compared, metrics, prompt_ids)
        for warning in found.warnings:
            warn(f"warning: {warning}")
        for warning in self.closed_on_noise(prepared):
            warn(f"warning: {warning}")
        if found.stop is not None:
            save(step)
            raise GeneratorDisagrees(found.stop)
        loss_scale = loss_scale_of(self._config, self._policy)
        said = self.collapse.observe(step, batch, results, loss_scale=loss_scale)
        if said is not None:
            save(step)
            raise RunCollapsed.of(self._config, said)

    def closed_on_noise(self, prepared: Prepared) -> Iterator[str]:
        """Say, once, that the gate has closed after this step on entropy that is flat."""
        closed = self.gate.has_tripped and prepared.num_fast > 0
        if closed and self.gate.is_flat and not self._said_flat:
            self._said_flat = True
            yield (
                f"train step {prepared.step}: the entropy gate has closed at z = "
                f"{self.gate.zscore:.3g}, on entropy without a trend or a jump in its window of "
                f"{self._config.sfpo.entropy_window} steps; docs/algorithm.md (The entropy gate) "
                "has settings that noise does not close"
            )


def objective_of(config: RunConfig) -> PolicyObjective:
    """What every pass minimizes."""
    # The first pass's first forward is under the weights before the update: it yields old_logprobs
    # of its minibatch, and no forward is paid for them.
    return PolicyObjective.of(config, first_pass_is_old=not config.objective.kl.in_reward)


def fast_passes(config: RunConfig, control: ControlGroup, gate: EntropyGate, step: int) -> int:
    """Fast passes of this step. Rank 0's gate decides for all: a rank that branches alone hangs
    the rest. Collective."""
    mine = config.sfpo.real_fast_passes if gate.is_open(step) else 0
    return int(control.broadcast_json(mine))


def _phase_times(timers: Timers) -> Mapping[str, float]:
    """Seconds by phase; what `sfpo_step` took beyond its passes is snapshot and reposition."""
    times = timers.take()
    times["time/reposition_s"] = times.pop("time/sfpo_s") - times["time/passes_s"]
    return times
