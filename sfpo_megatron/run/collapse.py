"""A collapsed run: steps in a row that make no update, or have nothing to learn from.

A task that is solved is none: its rewards are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sfpo_megatron.config.tree import RunConfig, TrainConfig
from sfpo_megatron.mcore.passes import PassResult
from sfpo_megatron.outputs.stopping import RunEnded
from sfpo_megatron.types import RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.setup import Policy

_WORDS = {"train": ("train step", "train.optimizer.lr"), "sft": ("step", "sft.lr")}


class RunCollapsed(RunEnded):
    """One of the limits is reached; raised on every rank, after a save."""

    @classmethod
    def of(cls, config: RunConfig, said: str) -> RunCollapsed:
        """The error of a run with that config; `said`: why."""
        saved = "saved" if config.saves_state else "not saved (checkpoint.every is 0)"
        return cls(f"{said}; the state after this step is {saved}")


class LostSteps:
    """Counts steps in a row that make no update. Fed alike on every rank."""

    def __init__(self, limit: int | None, *, section: Literal["train", "sft"]) -> None:
        """`limit`: the section's stop_after_skipped_steps."""
        self._limit, self._section = limit, section
        self._num = 0
        self._loss_scale = math.inf

    def observe(
        self, step: int, *, loss: float, num_skipped: int, num_steps: int, loss_scale: float
    ) -> str | None:
        """Why the run has collapsed, or None. `num_steps`: the step's optimizer steps, so many of
        which were skipped; `loss_scale`: after the step."""
        falls = self.pass_over(loss_scale=loss_scale)
        # float16 begins with skipped steps, by which Megatron finds its loss scale.
        lost = not math.isfinite(loss) or (num_skipped == num_steps and not falls)
        self._num = self._num + 1 if lost else 0
        if not _reached(self._num, self._limit):
            return None
        num, self._num = self._num, 0  # the next start counts again
        one, lr = _WORDS[self._section]
        return (
            f"{one} {step}: the last {num} {one}s had no finite loss or no optimizer step that was "
            f"made (now: loss {loss:.4g}, {num_skipped} of {num_steps} optimizer steps skipped), "
            f"as many as {self._section}.stop_after_skipped_steps: lower {lr}, or go back to a "
            "checkpoint from before"
        )

    def pass_over(self, *, loss_scale: float) -> bool:
        """Take in a step that says nothing; whether float16 has lowered its loss scale."""
        falls = loss_scale < self._loss_scale and math.isfinite(self._loss_scale)
        self._loss_scale = loss_scale
        return falls

    def state_dict(self) -> dict[str, Any]:
        """The count, and the loss scale after the last step."""
        return {"num_skipped": self._num, "loss_scale": _or_none(self._loss_scale)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue at a saved state; checkpoints of the versions before have none."""
        if state is not None:
            self._num = state["num_skipped"]
            self._loss_scale = _or_inf(state["loss_scale"])


class Collapse:
    """Counts train steps in a row. Fed alike on every rank."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._lost = LostSteps(train.stop_after_skipped_steps, section="train")
        self._num_zero = 0
        self._lowest_reward = math.inf

    def observe(
        self, step: int, batch: RolloutBatch, results: Sequence[PassResult], *, loss_scale: float
    ) -> str | None:
        """Why the run has collapsed, or None. `loss_scale`: after the step."""
        slow = results[-1]
        if slow.num_tokens == 0:  # every rollout is masked out, which says nothing
            self._lost.pass_over(loss_scale=loss_scale)
            return None
        said = self._lost.observe(
            step,
            loss=slow.mean(lambda m: m.loss),
            num_skipped=sum(result.num_skipped for result in results),
            num_steps=sum(len(result.minibatches) for result in results),
            loss_scale=loss_scale,
        )
        entropy, limit = slow.mean(lambda m: m.entropy), self._train.collapsed_entropy
        self._lowest_reward = min(self._lowest_reward, batch.rewards.min().item())
        # Where rewards below 0 have been seen, 0 is not the worst.
        zero = self._lowest_reward == 0 and not batch.rewards.any() and entropy < limit
        self._num_zero = self._num_zero + 1 if zero else 0
        if said is None and _reached(self._num_zero, self._train.stop_after_zero_reward_steps):
            num, self._num_zero = self._num_zero, 0  # the next start counts again
            return (
                f"train step {step}: in the last {num} train steps every reward was 0 "
                f"and the entropy below {limit:g} nats (now {entropy:.2g}), as many as "
                "train.stop_after_zero_reward_steps: look at the rollouts, lower "
                "train.optimizer.lr, or go back to a checkpoint from before"
            )
        return said

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the lowest reward that the run has seen."""
        own = {"num_zero": self._num_zero, "lowest_reward": _or_none(self._lowest_reward)}
        return own | self._lost.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue at a saved state; checkpoints of the versions before have none."""
        self._lost.load_state_dict(state)
        if state is not None:
            self._num_zero = state["num_zero"]
            self._lowest_reward = _or_inf(state["lowest_reward"])


def loss_scale_of(config: RunConfig, policy: Policy) -> float:
    """What float16 losses are multiplied by, rank 0's for all; else 1. Collective for float16."""
    if config.model.dtype != "float16":
        return 1.0
    own = float(policy.optimizer.get_loss_scale())
    return float(policy.control.broadcast_json(own))


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit


def _or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
