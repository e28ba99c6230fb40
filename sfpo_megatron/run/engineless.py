"""Feeds without engines: nothing is generated, so there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfpo_megatron.tracking.details import Sample
from sfpo_megatron.types import RolloutBatch


class EnginelessFeed:
    """What such feeds have in common, of `feed.Feed`."""

    metrics: Mapping[str, float] = {}
    samples: tuple[Sample, ...] = ()
    prompt_ids: tuple[str, ...] = ()

    def wait_generated(self) -> None:
        """There is nothing to wait for."""

    def hold(self, refit: Callable[[], None]) -> None:
        """Nothing is begun ahead."""

    def hand_back(self, step: int) -> None:
        """Nothing is used up by `collect`."""

    def state_dict(self) -> dict[str, Any]:
        """There is no cursor."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no cursor."""


class NoFeed(EnginelessFeed):
    """Another rank than 0: its batches come from there, and its cursor is saved there."""

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """Never called: `together` runs rank 0's work on rank 0."""
        raise AssertionError("only rank 0 collects rollouts")
