"""snapshots/timed.py: the seconds of a step, on a GPU those of its stream, which is played here.

Not exercised here: CUDA's own events.
"""

from __future__ import annotations

import time

import pytest
import torch

from sfpo_megatron.sfpo import sfpo_step
from sfpo_megatron.snapshots.timed import TimedSnapshot


class Steps:
    """A snapshot whose kernels take seconds, which the host does not wait for."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream

    def take(self) -> None:
        self.work(1.0)

    def reposition(self, alpha: float) -> None:
        self.work(2.0)

    def work(self, seconds: float) -> None:
        if self.stream is None:
            time.sleep(seconds / 20)
        else:
            self.stream.queued_s += seconds

    def buffers(self) -> list[torch.Tensor]:
        return []


class Stream:
    """How long a stream has been at work, once all that was put on it is done."""

    queued_s = 0.0
    waited_s = 0.0
    """Up to where the host has waited."""

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    """A CUDA event."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.at_s = stream, -1.0

    def record(self) -> None:
        self.at_s = self.stream.queued_s

    def synchronize(self) -> None:
        self.stream.waited_s = max(self.stream.waited_s, self.at_s)

    def elapsed_time(self, end: Event) -> float:
        assert end.at_s <= self.stream.waited_s, "CUDA raises: the event is not reached"
        return 1000 * (end.at_s - self.at_s)


def test_on_a_gpu_a_step_takes_what_its_stream_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing waits for it before somebody asks."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    steps = Steps(stream)
    snapshot = TimedSnapshot(steps)
    for _ in range(2):
        stream.queued_s += 100.0  # the step before is not done when this one is handed over
        sfpo_step(lambda: steps.work(10.0), snapshot, num_fast_passes=3, alpha=0.5)
        assert stream.waited_s < stream.queued_s - 10.0
        assert snapshot.take_seconds() == 3.0
    assert snapshot.take_seconds() == 0.0


def test_elsewhere_it_takes_what_the_host_takes() -> None:
    steps = Steps()
    snapshot = TimedSnapshot(steps)
    sfpo_step(lambda: steps.work(20.0), snapshot, num_fast_passes=1, alpha=0.5)
    assert 0.15 <= snapshot.take_seconds() < 2.0
