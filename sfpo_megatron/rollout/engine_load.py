"""How full an engine was: listens to the statistics of vLLM's scheduler."""

from __future__ import annotations

from typing import Protocol

from sfpo_megatron.rollout.reports import EngineLoad


class SchedulerStats(Protocol):
    """The part of `vllm.v1.metrics.stats.SchedulerStats` that is used here."""

    kv_cache_usage: float


class IterationStats(Protocol):
    """The part of `vllm.v1.metrics.stats.IterationStats` that is used here."""

    num_preempted_reqs: int


class LoadListener:
    """What vLLM calls after each of its steps (`vllm.v1.metrics.loggers.StatLoggerBase`)."""

    def __init__(self) -> None:
        self._highest_usage = 0.0
        self._num_preemptions = 0
        self.num_steps = 0
        """Steps that vLLM has made."""

    def take(self) -> EngineLoad:
        """The load since the last call."""
        load = EngineLoad(kv_cache_usage=self._highest_usage, num_preemptions=self._num_preemptions)
        self._highest_usage, self._num_preemptions = 0.0, 0
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

    def log_engine_initialized(self) -> None:
        """Nothing is to be said of the start."""

    def log(self) -> None:
        """The controller asks; nothing is said by itself."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Sleep is our own doing."""
