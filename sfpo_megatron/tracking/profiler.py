"""Spans as torch sees them: NVTX ranges on a GPU, and torch.profiler around train steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from sfpo_megatron.config.tracing import TraceConfig
from sfpo_megatron.host.spans import Detail, watch_spans
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.trace import STEP


def profile_spans(config: TraceConfig, run: RunDirectory, rank: int) -> None:
    """Have this rank's spans seen by Nsight Systems where there is a GPU, and the steps of
    `trace.steps` by torch.profiler if that is asked for."""
    if torch.cuda.is_available():
        watch_spans(nvtx_range)
    if config.torch_profiler:
        watch_spans(StepProfiler(config, run, rank))


@contextmanager
def nvtx_range(name: str, details: dict[str, Detail]) -> Iterator[None]:
    """An NVTX range; without a profiler attached it costs a call."""
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Writes RUN/trace/step_0000005_rank_0.torch.json.gz for each of the steps."""

    def __init__(self, config: TraceConfig, run: RunDirectory, rank: int) -> None:
        self._steps = frozenset(config.steps)
        self._run = run
        self._rank = rank

    @contextmanager
    def __call__(self, name: str, details: dict[str, Detail]) -> Iterator[None]:
        """Profile what is inside if it is one of the steps."""
        step = details.get(STEP)
        if name != STEP or step not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as seen:
            yield
        self._run.trace.mkdir(parents=True, exist_ok=True)
        file = self._run.trace / f"step_{int(step):07}_rank_{self._rank}.torch.json.gz"
        seen.export_chrome_trace(str(file))
