"""Wall-clock seconds and the most memory per phase of a train step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import Detail
from sfpo_megatron.tracking.memory import NO_PEAK, PeakMemory


class Timers:
    """`with timers("generate"): ...` adds to `time/generate_s`; `take()` reads and clears."""

    def __init__(self, memory: PeakMemory = NO_PEAK) -> None:
        self._memory = memory
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str, **details: Detail) -> Iterator[None]:
        self._observe_memory()
        self._open.append(name)
        start = time.perf_counter()
        try:
            with doing(name, **details):
                yield
        finally:
            key = f"time/{name}_s"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start
            self._observe_memory()
            self._open.pop()

    def _observe_memory(self) -> None:
        """What was needed since the last look counts for every phase that is under way."""
        peak = self._memory.take_bytes()
        for name in self._open if peak else ():
            self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, one key a phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def take_peaks(self) -> dict[str, int]:
        """Phase -> the most bytes during it since the last `take_peaks`; empty where nothing can be
        measured."""
        peaks, self._peaks = self._peaks, {}
        return peaks
