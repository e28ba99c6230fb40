"""How long a run still takes."""

from __future__ import annotations

import statistics
from collections import deque

_RECENT = 9


class Pace:
    """Time left, by the medians of the last steps and evaluations."""

    def __init__(self, num_steps: int, eval_every: int) -> None:
        """`eval_every`: steps between evaluations, of which one more comes at the end; 0: that one
        alone."""
        self._num_steps = num_steps
        self._eval_every = eval_every
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._evaluations: deque[float] = deque(maxlen=_RECENT)
        self._last: tuple[int, float] | None = None  # step, and when its line came
        self._since_then_s = 0.0  # that evaluations have taken
        self._next_evaluation = 0  # the first step whose evaluation may be to come

    def stepped(self, step: int, now: float) -> None:
        """A step has ended. The first also warms up: it is not counted."""
        if self._last is not None and step > self._last[0]:
            took_s = now - self._last[1] - self._since_then_s
            self._steps.append(took_s / (step - self._last[0]))
        self._last, self._since_then_s, self._next_evaluation = (step, now), 0.0, step

    def evaluated(self, step: int, took_s: float) -> None:
        """An evaluation after `step` has ended."""
        self._evaluations.append(took_s)
        self._since_then_s += took_s
        self._next_evaluation = step + 1

    @property
    def left_s(self) -> float | None:
        """Seconds until the end of the run; None where no pace is known yet."""
        if self._last is None or not self._steps:
            return None
        left_s = statistics.median(self._steps) * max(0, self._num_steps - self._last[0])
        if self._evaluations:
            left_s += statistics.median(self._evaluations) * self._num_evaluations()
        return left_s

    def _num_evaluations(self) -> int:
        """How many are to come."""
        every, first, last = self._eval_every, self._next_evaluation, self._num_steps
        if first > last:
            return 0
        periodic = last // every - (first - 1) // every if every else 0
        return periodic + (not every or last % every != 0)


def clock(seconds: float) -> str:
    """`H:MM:SS`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
