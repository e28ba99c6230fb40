"""The sink `console`: a line of progress a train step or evaluation."""

from __future__ import annotations

import sys
import time

from sfpo_megatron.tracking.block import sample_block
from sfpo_megatron.tracking.details import Details
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
_SAMPLE_CHARS = 600
_LOSS = ("loss", "loss", "6.3f")


class ConsoleSink:
    """One aligned line a train step or evaluation; the same with and without a terminal."""

    def __init__(self, run: RunInfo) -> None:
        self._num_steps = run.num_steps
        self._first: tuple[int, float] | None = None  # (step, time) that the ETA is taken from

    def log(self, metrics: Metrics) -> None:
        step = metrics.get("step")
        if "eval/accuracy" in metrics:
            accuracy = metrics["eval/accuracy"]
            text = "n/a" if accuracy is None else f"{accuracy:.3f}"
            self.text(f"step {step}: held-out accuracy {text}")
        if "eval/loss" in metrics:
            self.text(f"step {step}: held-out loss {_format(metrics['eval/loss'], '.4f')}")
        if "reward_mean" in metrics or "loss" in metrics:
            self._step(int(step or 0), metrics)

    def text(self, line: str) -> None:
        # A model may write what the terminal's encoding has no letter for.
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def details(self, details: Details) -> None:
        if details.samples:
            self.text(sample_block(details.step, details.samples, max_chars=_SAMPLE_CHARS))

    def close(self) -> None:
        """Nothing is left to write."""

    def _step(self, step: int, metrics: Metrics) -> None:
        columns = _COLUMNS if "reward_mean" in metrics else (_LOSS, *_COLUMNS)  # the warm start
        shown = [(h, _format(metrics[k], f)) for k, h, f in columns if k in metrics]
        width = len(str(self._num_steps))
        cells = "  ".join(f"{heading} {value}" for heading, value in shown)
        self.text(f"step {step:>{width}}/{self._num_steps}  {cells}  {self._eta(step)}".rstrip())

    def _eta(self, step: int) -> str:
        """From the pace since the first line that was shown (the first step also warms up)."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return ""
        pace = (now - self._first[1]) / (step - self._first[0])
        minutes, seconds = divmod(round(pace * max(0, self._num_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"ETA {hours}:{minutes:02}:{seconds:02}"


def _format(value: Number, spec: str) -> str:
    if value is None:
        return "n/a".rjust(int(spec.split(".")[0].rstrip("def") or 0))
    return format(int(value) if spec == "d" else value, spec)
