"""Seconds and the most memory per phase of a train step.

On a GPU the host only hands kernels over, and would count them in whatever phase waits for them. So
a phase begins when the stream has done what was before it, and ends when it has done what is in it.
Events mark both, and are read when the seconds are taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

import torch

from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import Detail
from sfpo_megatron.tracking.memory import NO_PEAK, PeakMemory


class Timers:
    """`with timers("generate"): ...` adds to `time/generate_s`; `take()` reads and clears."""

    def __init__(self, memory: PeakMemory = NO_PEAK) -> None:
        self._memory = memory
        self._phases: list[tuple[str, _Mark, _Mark]] = []
        self._peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str, **details: Detail) -> Iterator[None]:
        self._observe_memory()
        self._open.append(name)
        start = _mark()
        try:
            with doing(name, **details):
                yield
        except BaseException:
            with suppress(RuntimeError):  # CUDA's next error would hide its first
                self._phases.append((f"time/{name}_s", start, _mark()))
            raise
        else:
            self._phases.append((f"time/{name}_s", start, _mark()))
        finally:
            self._observe_memory()
            self._open.pop()

    def _observe_memory(self) -> None:
        """What was needed since the last look counts for every phase that is under way."""
        peak = self._memory.take_bytes()
        for name in self._open if peak else ():
            self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, one key a phase. Waits until a GPU has done them."""
        phases, self._phases = self._phases, []
        seconds: dict[str, float] = {}
        for key, start, end in phases:
            seconds[key] = seconds.get(key, 0.0) + _seconds(start, end)
        return seconds

    def take_peaks(self) -> dict[str, int]:
        """Phase -> the most bytes during it since the last `take_peaks`; empty where nothing can be
        measured."""
        peaks, self._peaks = self._peaks, {}
        return peaks


_Mark: TypeAlias = "float | torch.cuda.Event"
"""A time of the host's clock in seconds, or a place in the current stream of a GPU."""


def _mark() -> _Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
