"""What the controller tells rank 0 besides rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfpo_megatron.data.selective import Outcome
from sfpo_megatron.types import Rollout


@dataclass(kw_only=True, frozen=True, slots=True)
class RolloutTimes:
    """Seconds of a request, by what took them."""

    generate_s: float
    """Time between submit and the last token."""
    reward_s: float
    """Scoring that was left to do after the last token; the rest ran meanwhile."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SamplingCounts:
    """What became of the groups of one request. `num_groups` = in the answer + dropped + surplus -
    taken back."""

    num_rounds: int
    num_groups: int
    """Generated and scored."""
    num_zero_variance: int = 0
    """Dropped: all rewards equal."""
    num_truncated: int = 0
    """Dropped: no response ended by itself."""
    num_duplicate: int = 0
    """Dropped: a prompt that an earlier round had (at the end of an epoch)."""
    num_surplus: int = 0
    """Good, but not needed."""
    num_taken_back: int = 0
    """Dropped, then used after all: the rounds did not fill the batch."""


@dataclass(kw_only=True, frozen=True, slots=True)
class EngineLoad:
    """How full and how busy engines were, of one or of all."""

    kv_cache_usage: float
    """Largest share of the blocks for keys and values that was in use."""
    num_preemptions: int
    """Times that a rollout had to give up its blocks, to be computed again."""
    num_requests: int
    """Requests that vLLM has ended: a rollout, or one turn of it."""
    queue_s: float
    """Seconds that these waited until they were first scheduled, summed."""
    busy_s: float
    """Seconds in which at least one of them ran, of one engine or the mean of all."""

    @staticmethod
    def of_all(loads: Sequence[EngineLoad]) -> EngineLoad:
        """The fullest engine, what all have counted, and how long they ran on average."""
        return EngineLoad(
            kv_cache_usage=max((load.kv_cache_usage for load in loads), default=0.0),
            num_preemptions=sum(load.num_preemptions for load in loads),
            num_requests=sum(load.num_requests for load in loads),
            queue_s=sum(load.queue_s for load in loads),
            busy_s=sum(load.busy_s for load in loads) / max(1, len(loads)),
        )

    @property
    def mean_queue_s(self) -> float:
        """How long a request waited."""
        return self.queue_s / max(1, self.num_requests)

    def busy_in(self, seconds: float) -> float:
        """Share of these seconds; at most 1, though other requests ran before and after."""
        return min(1.0, self.busy_s / seconds) if seconds > 0 else 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class ScoredRequest:
    """The answer to one request."""

    rollouts: list[Rollout]
    times: RolloutTimes
    counts: SamplingCounts
    outcomes: Mapping[str, Outcome]
    """Prompt id -> outcome of each group that was generated."""
    load: EngineLoad
    """Load of the engines since the request before."""
    num_reissued: int
    """Rollouts that were asked for again so far in the run: their engine was lost."""
    num_restarts: int
    """Number of engines restarted so far in the run."""


@dataclass(kw_only=True, slots=True)
class RolloutCount:
    """How far a request has come."""

    num_done: int = 0
    """Rollouts that are generated and scored."""
    num_asked: int = 0
    """Rollouts of the rounds so far."""


@dataclass(kw_only=True, frozen=True, slots=True)
class FleetProgress:
    """What the controller is at."""

    count: RolloutCount
    """Rollouts of the request that was asked about; zeros if there is none such."""
    starting: tuple[str, ...]
    """What each engine that has yet to start is at."""

    @property
    def note(self) -> str:
        """`starting` in a few words."""
        if len(self.starting) <= 2:
            return ", ".join(self.starting)
        return f"{self.starting[0]}, and {len(self.starting) - 1} more"


def environment_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`environment/NAME`: the mean of what the environment measured, over the rollouts that have
    it; of `turn_rewards`, which a rollout without any has none of, over all once one has some."""
    found: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in rollout.metrics.items():
            found[name].append(float(value))
    if some := found.get("turn_rewards"):
        some += [0.0] * (len(rollouts) - len(some))
    return {f"environment/{name}": sum(values) / len(values) for name, values in found.items()}


@dataclass(kw_only=True, frozen=True, slots=True)
class FleetHealth:
    """The engines as they are now."""

    engines_alive: tuple[bool, ...]
    num_unfinished_requests: int
    weight_version: int
    num_restarts: int
