"""The feed of a rank that does not talk to engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfpo_megatron.tracking.details import Sample
from sfpo_megatron.types import RolloutBatch


class NoFeed:
    """Another rank than 0: its batches come from there."""

    metrics: Mapping[str, float] = {}
    samples: tuple[Sample, ...] = ()
    prompt_ids: tuple[str, ...] = ()

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """Never called: `together` runs rank 0's work on rank 0."""
        raise AssertionError("only rank 0 collects rollouts")

    def wait_generated(self) -> None:
        """There is nothing to wait for."""

    def hold(self, refit: Callable[[], None]) -> None:
        """Nothing is begun ahead."""

    def hand_back(self, step: int) -> None:
        """Rank 0 has the batch."""

    def state_dict(self) -> dict[str, Any]:
        """Rank 0 alone saves the data cursor."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rank 0 alone has prompts."""
