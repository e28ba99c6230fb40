"""A snapshot whose two steps are seen in a trace, and whose seconds are counted.

Spans are those of the host, which only hands kernels over. The seconds are the GPU's own: from what
it had to do before a step to the end of the step. They are read later, and nothing waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from sfpo_megatron.host.spans import span
from sfpo_megatron.sfpo import Snapshot


class TimedSnapshot:
    """Another snapshot, with a span and a count of seconds around each step."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._steps: list[tuple[_Mark, _Mark]] = []

    def take(self) -> None:
        with self._timed("snapshot"):
            self._snapshot.take()

    def reposition(self, alpha: float) -> None:
        with self._timed("reposition"):
            self._snapshot.reposition(alpha)

    def buffers(self) -> list[Tensor]:
        return self._snapshot.buffers()

    def take_seconds(self) -> float:
        """The seconds of all steps since the last call; to be asked when the pass after them has
        ended, or the GPU is waited for."""
        steps, self._steps = self._steps, []
        return sum(_seconds(*step) for step in steps)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = _mark()
        with span(name):
            yield
        self._steps.append((begin, _mark()))


_Mark: TypeAlias = "float | torch.cuda.Event"
"""A time of the host's clock in seconds, or a place in the current stream of a GPU."""


def _mark() -> _Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
