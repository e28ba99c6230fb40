"""How full and how busy an engine was: listens to the statistics of vLLM's scheduler.

A stat logger of one's own makes vLLM collect all of them (`AsyncLLM.log_stats`), whatever
`disable_log_stats` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from sfpo_megatron.rollout.reports import EngineLoad


class SchedulerStats(Protocol):
    """The part of `vllm.v1.metrics.stats.SchedulerStats` that is used here."""

    kv_cache_usage: float


class FinishedRequestStats(Protocol):
    """The part of `vllm.v1.metrics.stats.FinishedRequestStats` that is used here."""

    queued_time: float
    """Seconds from its arrival in the scheduler until it was first scheduled."""
    inference_time: float
    """Seconds from then until its last token, preemptions included."""


class IterationStats(Protocol):
    """The part of `vllm.v1.metrics.stats.IterationStats` that is used here."""

    num_preempted_reqs: int

    @property
    def finished_requests(self) -> Sequence[FinishedRequestStats]:
        """Requests that ended with this step."""


class LoadListener:
    """What vLLM calls after each of its steps (`vllm.v1.metrics.loggers.StatLoggerBase`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.num_steps = 0
        """Steps that vLLM has made."""
        self._begin()

    def _begin(self) -> None:
        self._began = self._clock()
        self._highest_usage = 0.0
        self._num_preemptions = 0
        self._num_requests = 0
        self._queue_s = 0.0
        self._spans: list[tuple[float, float]] = []
        """Begin and end of each request."""

    def take(self) -> EngineLoad:
        """The load since the last call."""
        load = EngineLoad(
            kv_cache_usage=self._highest_usage,
            num_preemptions=self._num_preemptions,
            num_requests=self._num_requests,
            queue_s=self._queue_s,
            busy_s=covered(self._spans),
        )
        self._begin()
        return load

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        """Take in one step's statistics."""
        self.num_steps += 1
        if scheduler_stats is not None:
            self._highest_usage = max(self._highest_usage, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self._num_preemptions += iteration_stats.num_preempted_reqs
            self._observe(iteration_stats.finished_requests)

    def _observe(self, finished: Sequence[FinishedRequestStats]) -> None:
        now = self._clock()
        for request in finished:
            self._num_requests += 1
            # vLLM subtracts times, of which one that was aborted early lacks some: they are 0.
            self._queue_s += max(0.0, request.queued_time)
            start = max(self._began, now - max(0.0, request.inference_time))
            self._spans.append((start, now))

    def log_engine_initialized(self) -> None:
        """Nothing is to be said of the start."""

    def log(self) -> None:
        """The controller asks; nothing is said by itself."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Sleep is our own doing."""


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that at least one of these (start, end) covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
