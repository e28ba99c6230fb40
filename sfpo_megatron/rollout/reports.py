"""What the controller tells rank 0 besides rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from sfpo_megatron.types import Rollout


@dataclass(kw_only=True, frozen=True, slots=True)
class RolloutTimes:
    """Where a request's time went."""

    generate_s: float
    """From submit to the last token."""
    reward_s: float
    """Scoring that was left to do after the last token; the rest ran meanwhile."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ScoredRequest:
    """The answer to one request."""

    rollouts: list[Rollout]
    times: RolloutTimes


@dataclass(kw_only=True, frozen=True, slots=True)
class FleetHealth:
    """The engines as they are now."""

    engines_alive: tuple[bool, ...]
    num_unfinished_requests: int
    weight_version: int
