"""The sink `console`: a line of progress a train step or evaluation, on the process's screen."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sfpo_megatron.tracking.details import Details
from sfpo_megatron.tracking.pace import Pace, clock
from sfpo_megatron.tracking.screen import screen
from sfpo_megatron.tracking.sinks import Metrics, Number, RunInfo

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    # metric, heading, format
    ("reward_mean", "reward", "6.3f"),
    ("accuracy", "acc", "6.3f"),
    ("entropy", "entropy", "6.3f"),
    ("grad_norm", "grad", "8.2e"),
    ("num_passes", "passes", "d"),
    ("time/step_s", "s/step", "5.1f"),
)
_LOSS = ("loss", "loss", "6.3f")
_SPARED = ("num_passes", "grad_norm", "entropy")
"""What a narrow terminal does not show, the first of these first."""


class ConsoleSink:
    """One aligned line a train step or evaluation."""

    def __init__(self, run: RunInfo) -> None:
        self._num_steps = run.num_steps
        self._pace = Pace(run.num_steps, run.eval_every)
        self._screen = screen()
        self._screen.length(run.num_steps, None)

    def log(self, metrics: Metrics) -> None:
        step = int(metrics.get("step") or 0)
        if "reward_mean" in metrics or "loss" in metrics:
            self._pace.stepped(step, time.monotonic())
        if seconds := metrics.get("time/evaluate_s"):
            self._pace.evaluated(step, seconds)
        self._screen.metrics(metrics, list(self._lines(step, metrics)))
        self._screen.length(self._num_steps, self._pace.left_s)

    def text(self, line: str) -> None:
        self._screen.text(line)

    def important(self, line: str) -> None:
        self._screen.text(line, important=True)

    def details(self, details: Details) -> None:
        if details.samples:
            self._screen.samples(details.step, details.samples)

    def close(self) -> None:
        """The screen is the process's."""

    def _lines(self, step: int, metrics: Metrics) -> Iterator[str]:
        if "eval/accuracy" in metrics:
            accuracy = metrics["eval/accuracy"]
            text = "n/a" if accuracy is None else f"{accuracy:.3f}"
            yield f"step {step}: held-out accuracy {text}"
        if "eval/loss" in metrics:
            yield f"step {step}: held-out loss {_format(metrics['eval/loss'], '.4f')}"
        if "reward_mean" in metrics or "loss" in metrics:
            yield self._step(step, metrics)

    def _step(self, step: int, metrics: Metrics) -> str:
        columns = _COLUMNS if "reward_mean" in metrics else (_LOSS, *_COLUMNS)  # the warm start
        shown = {k: f"{h} {_format(metrics[k], f)}" for k, h, f in columns if k in metrics}
        width = len(str(self._num_steps))
        head = f"step {step:>{width}}/{self._num_steps}"
        for spared in _SPARED:
            if self._screen.width is None or len("  ".join((head, *shown.values()))) <= (
                self._screen.width
            ):
                break
            shown.pop(spared, None)
        cells = [head, *shown.values()]
        left_s = self._pace.left_s
        if left_s is not None and not self._screen.shows_time_left:
            cells.append(f"ETA {clock(left_s)}")
        return "  ".join(cells)


def _format(value: Number, spec: str) -> str:
    if value is None:
        return "n/a".rjust(int(spec.split(".")[0].rstrip("def") or 0))
    return format(int(value) if spec == "d" else value, spec)
