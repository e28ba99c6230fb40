"""Rank 0's source of rollout batches: prompts go out to engines, scored rollouts come back.

Rank 0 alone talks to the engines and holds prompts and tokenizer; the other ranks have `NoFeed`.
`saved_rollouts.SavedFeed` reads batches from a file instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import PromptStream
from sfpo_megatron.data.selective import History, NoHistory, ZeroVarianceHistory
from sfpo_megatron.run.continuing import warn
from sfpo_megatron.run.metrics import rollout_metrics
from sfpo_megatron.run.samples import SamplePicker
from sfpo_megatron.run.saved_rollouts import from_tensors, tensors_of, to_tensors
from sfpo_megatron.tracking.details import Sample
from sfpo_megatron.types import RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.rollout.client import RolloutClient


class Feed(Protocol):
    """Batches on rank 0, and the state that lets a resumed run draw the same ones."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Times of the last `collect`, the age of its weights, what was dropped."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Sample rollouts of the last `collect`, where tracking.samples asks for them."""

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """The id of each prompt of the last `collect`; empty where they are not known."""

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """The batch of train step `step`; `refit` sends restarted engines the current weights."""

    def wait_generated(self) -> None:
        """Return when no engine generates for a later step: a rollout has one weight version."""

    def hold(self, refit: Callable[[], None]) -> None:
        """Take in what was begun ahead: older weights than a resumed run has made it."""

    def hand_back(self, step: int) -> None:
        """Keep the batch that `collect` gave, which was not used, for the next `collect`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps (`saving.Stateful`)."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved state."""


@dataclass(kw_only=True, frozen=True, slots=True)
class _Received:
    """One step's batch, and what is told of it."""

    batch: RolloutBatch
    metrics: Mapping[str, float]
    samples: tuple[Sample, ...]
    prompt_ids: tuple[str, ...] = ()
    """Not kept in checkpoints."""


class EngineFeed:
    """Rank 0's end: prompts out, scored rollouts back."""

    def __init__(self, config: RunConfig, client: RolloutClient, prompts: PromptStream) -> None:
        self._config = config
        self._client = client
        self._prompts = prompts
        self._history: History = NoHistory()
        if config.data.skip_zero_variance:
            self._history = ZeroVarianceHistory(config.data.zero_variance_target)
        self._cursors: dict[int, list[dict[str, Any]]] = {}
        """Steps under way -> the prompts' cursor before each of the rounds, and after the last."""
        self._picker = SamplePicker(config.tracking.samples)
        self._held: dict[int, _Received] = {}
        """Step -> what was taken in before the step began (`hold`), or given back."""
        self._given: _Received | None = None
        self.metrics: Mapping[str, float] = {}
        """What `Feed.metrics` says; empty before the first `collect`."""
        self.samples: tuple[Sample, ...] = ()
        self.prompt_ids: tuple[str, ...] = ()

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """One train step's scored rollouts. With async_steps the next step's are begun too.

        `refit` sends the current weights again, to engines that were restarted.
        """
        if step in self._held:
            received = self._held.pop(step)
        else:
            if step not in self._cursors:
                self._submit(step)
            received = self._receive(step, refit)
        self.metrics, self.samples, self._given = received.metrics, received.samples, received
        self.prompt_ids = received.prompt_ids
        if self._config.rollout.async_steps and step < self._config.train.steps:
            try:
                self._submit(step + 1)
            except BaseException:
                self.hand_back(step)
                raise
        return received.batch

    def _receive(self, step: int, refit: Callable[[], None]) -> _Received:
        """A step under way, to its end. If this raises, it is under way still."""
        scored = self._client.collect_scored(_request_id(step), refit)
        cursors = self._cursors.pop(step)
        self._history.observe(scored.outcomes)
        metrics = dict(self._history.metrics)
        if self._config.data.skip_zero_variance:
            skipped = cursors[scored.counts.num_rounds]["skipped"] - cursors[0]["skipped"]
            metrics["num_rollouts_spared"] = skipped * self._config.train.group_size
        if scored.counts.num_rounds < len(cursors) - 1:  # the rest goes back where it came from
            self._prompts.load_state_dict(cursors[scored.counts.num_rounds])
        group_size = self._config.train.group_size
        batch = RolloutBatch.from_rollouts(scored.rollouts, group_size)
        staleness = step - 1 - batch.weight_version
        self._check(step, batch, staleness)
        return _Received(
            batch=batch,
            metrics=rollout_metrics(scored, staleness) | metrics,
            samples=self._picker.pick(step, scored.rollouts, group_size),
            prompt_ids=tuple(one.prompt_id for one in scored.rollouts[::group_size]),
        )

    def wait_generated(self) -> None:
        """Return when no engine generates for a later step: a rollout has one weight version."""
        for step in self._cursors:
            self._client.wait_generated(_request_id(step))

    def hand_back(self, step: int) -> None:
        """Keep the batch that `collect` gave, which was not used, for the next `collect`."""
        if self._given is not None:
            self._held[step] = self._given

    def hold(self, refit: Callable[[], None]) -> None:
        """Take in what was begun ahead: older weights than a resumed run has made it."""
        for step in list(self._cursors):
            self._held[step] = self._receive(step, refit)

    def state_dict(self) -> dict[str, Any]:
        """The prompts' cursor after the last batch that is here, as steps under way begin again;
        `rollouts`: the tensors of the batches that `hold` took in."""
        first = min(self._cursors, default=None)
        cursor = self._prompts.state_dict() if first is None else self._cursors[first][0]
        rollouts: dict[str, Tensor] = {
            f"{step}.{name}": tensor
            for step, held in self._held.items()
            for name, tensor in to_tensors(held.batch).items()
        }
        return {
            "prompts": cursor,
            "history": self._history.state_dict(),
            "held": {step: dict(held.metrics) for step, held in self._held.items()},
            "samples": {
                step: [sample.to_json() for sample in held.samples]
                for step, held in self._held.items()
            },
            "rollouts": rollouts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved state."""
        if "prompts" in state:  # not where debug.train_only alone has trained, which draws none
            self._prompts.load_state_dict(state["prompts"])
        if not self._prompts.has_changed:  # else its ids may be other rows'
            self._history.load_state_dict(state.get("history", {}))  # versions before had none
        samples = state.get("samples", {})  # versions before had none
        for step, metrics in state.get("held", {}).items():
            batch = from_tensors(tensors_of(step, state["rollouts"]))
            if not self._has_our_size(batch):
                warn(
                    f"train step {step}: its {batch.num_rollouts} rollouts (groups of "
                    f"{batch.group_size}) were begun under another train.prompts_per_step or "
                    "train.group_size: they are let go, and other prompts take their place"
                )
                continue
            self._held[int(step)] = _Received(
                batch=batch,
                metrics=metrics,
                samples=tuple(Sample.from_json(one) for one in samples.get(step, ())),
            )

    def _submit(self, step: int) -> None:
        from sfpo_megatron.rollout.sampling import RolloutRequest

        train, rollout = self._config.train, self._config.rollout
        num_rounds = rollout.max_rounds if rollout.drop_groups else 1
        num_prompts = math.ceil(train.prompts_per_step * rollout.oversample)
        cursors = [self._prompts.state_dict()]
        rounds = []
        for _ in range(num_rounds):
            rounds.append(tuple(self._prompts.next_batch(num_prompts, self._history)))
            cursors.append(self._prompts.state_dict())
        self._cursors[step] = cursors
        self._picker.asked(step, chain(*rounds))
        self._client.submit(
            RolloutRequest(
                id=_request_id(step),
                step=step,
                prompts=rounds[0],
                refills=tuple(rounds[1:]),
                num_samples=train.group_size,
                num_groups=train.prompts_per_step,
                drop=rollout.drop_groups,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                max_response_tokens=rollout.max_response_tokens,
            )
        )

    def _has_our_size(self, batch: RolloutBatch) -> bool:
        size, train = batch.group_size, self._config.train
        return (size, batch.num_rollouts) == (train.group_size, train.prompts_per_step * size)

    def _check(self, step: int, batch: RolloutBatch, staleness: int) -> None:
        train, allowed = self._config.train, self._config.rollout.async_steps
        if batch.num_rollouts != train.prompts_per_step * train.group_size:
            raise RuntimeError(
                f"train step {step}: found {batch.num_rollouts} rollouts, expected "
                f"{train.prompts_per_step * train.group_size}"
            )
        if staleness > allowed and not self._config.debug.rollout_only:
            raise RuntimeError(
                f"train step {step}: found rollouts by weights {staleness} updates old, expected "
                f"at most rollout.async_steps={allowed}: refused"
            )


def _request_id(step: int) -> str:
    return f"train/{step}"
