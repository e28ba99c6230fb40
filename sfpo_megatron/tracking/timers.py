"""Wall-clock seconds per phase of a train step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import Detail


class Timers:
    """`with timers("generate"): ...` adds to `time/generate_s`; `take()` reads and clears."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, **details: Detail) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with doing(name, **details):
                yield
        finally:
            key = f"time/{name}_s"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, one key a phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds
