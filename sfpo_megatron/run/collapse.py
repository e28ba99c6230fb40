"""A collapsed run: train steps in a row that make no update, or have nothing to learn from.

A task that is solved is none: its rewards are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfpo_megatron.config.tree import TrainConfig
from sfpo_megatron.mcore.passes import PassResult
from sfpo_megatron.outputs.stopping import RunEnded
from sfpo_megatron.types import RolloutBatch

DEAD_ENTROPY = 0.01
"""Nats a token: below it samples of a prompt are alike."""


class RunCollapsed(RunEnded):
    """One of the limits is reached; raised on every rank, after a save."""


class Collapse:
    """Counts train steps in a row. Fed alike on every rank."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._num_skipped = self._num_zero = 0
        self._loss_scale = math.inf
        self._lowest_reward = math.inf

    def observe(
        self, step: int, batch: RolloutBatch, results: Sequence[PassResult], *, loss_scale: float
    ) -> str | None:
        """Why the run has collapsed, or None. `loss_scale`: after the step."""
        slow = results[-1]
        falls = loss_scale < self._loss_scale and math.isfinite(self._loss_scale)
        self._loss_scale = loss_scale
        if slow.num_tokens == 0:  # every rollout is masked out, which says nothing
            return None
        loss = slow.mean(lambda m: m.loss)
        entropy = slow.mean(lambda m: m.entropy)
        num_steps = sum(len(result.minibatches) for result in results)
        num_skipped = sum(result.num_skipped for result in results)
        # float16 begins with skipped steps, by which Megatron finds its loss scale.
        lost = not math.isfinite(loss) or (num_skipped == num_steps and not falls)
        self._num_skipped = self._num_skipped + 1 if lost else 0
        self._lowest_reward = min(self._lowest_reward, batch.rewards.min().item())
        # Where rewards below 0 have been seen, 0 is not the worst.
        zero = self._lowest_reward == 0 and not batch.rewards.any() and entropy < DEAD_ENTROPY
        self._num_zero = self._num_zero + 1 if zero else 0
        if _reached(self._num_skipped, self._train.stop_after_skipped_steps):
            return (
                f"train step {step}: the last {self._num_skipped} train steps had no finite loss "
                f"or no optimizer step that was made (now: loss {loss:.4g}, {num_skipped} of "
                f"{num_steps} optimizer steps skipped), as many as "
                "train.stop_after_skipped_steps: lower train.optimizer.lr, or go back to a "
                "checkpoint from before"
            )
        if _reached(self._num_zero, self._train.stop_after_zero_reward_steps):
            return (
                f"train step {step}: in the last {self._num_zero} train steps every reward was 0 "
                f"and the entropy below {DEAD_ENTROPY:g} nats (now {entropy:.2g}), as many as "
                "train.stop_after_zero_reward_steps: look at the rollouts, lower "
                "train.optimizer.lr, or go back to a checkpoint from before"
            )
        return None


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit
