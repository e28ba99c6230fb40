"""Timers on a GPU: a phase takes what its stream takes, which is played here.

Not exercised: CUDA's own events. The host's clock is in test_tracking.py.
"""

from __future__ import annotations

import pytest
import torch

from sfpo_megatron.sfpo import sfpo_step
from sfpo_megatron.tracking.timers import Timers


class Stream:
    """How long a stream has been at work, once all that was put on it is done."""

    queued_s = 0.0
    waited_s = 0.0
    """Up to where the host has waited."""

    def work(self, seconds: float) -> None:
        self.queued_s += seconds

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


class Snapshot:
    """Its kernels take seconds, which the host does not wait for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def take(self) -> None:
        self.stream.work(1.0)

    def reposition(self, alpha: float) -> None:
        self.stream.work(2.0)

    def buffers(self) -> list[torch.Tensor]:
        return []


def test_a_phase_takes_what_its_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not done when it begins is of the phase before; nothing waits within the step."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    timers = Timers()

    def one_pass() -> None:
        with timers("passes"):
            stream.work(10.0)

    for _ in range(2):
        with timers("step"):
            with timers("logprob"):
                stream.work(5.0)
            with timers("sfpo"):
                sfpo_step(one_pass, Snapshot(stream), num_fast_passes=3, alpha=0.5)
        assert stream.waited_s <= stream.queued_s - 48.0
        assert timers.take() == {
            "time/step_s": 48.0,
            "time/logprob_s": 5.0,
            "time/sfpo_s": 43.0,  # of which 3 beyond its passes
            "time/passes_s": 40.0,
        }
    assert timers.take() == {}


def test_what_ends_a_phase_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """After CUDA's first error every call raises another, the end mark too."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    timers = Timers()

    def fails(**_: bool) -> Event:
        raise RuntimeError("CUDA error: the next one")

    with pytest.raises(ValueError, match="the cause"), timers("step"), timers("passes"):
        monkeypatch.setattr(torch.cuda, "Event", fails)
        raise ValueError("the cause")
    assert timers.take() == {}
