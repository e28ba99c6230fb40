"""Metrics out of the trainer: a jsonl line a step, and a progress line on the console."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory

Metrics = Mapping[str, Any]  # numbers and booleans; anything with .item() is turned into one

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


class JsonlSink:
    """Appends one line per call; each is flushed, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        # One write of a whole line: a reader that follows the file never sees half of one
        # (lines are far below the buffer size, and flush hands the buffer over at once).
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ConsoleSink:
    """One aligned line a train step or evaluation; the same with and without a terminal."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._stream = stream if stream is not None else sys.stdout
        self._first: tuple[int, float] | None = None  # (step, time) that the ETA is taken from

    def log(self, metrics: Metrics) -> None:
        step = metrics.get("step")
        if "eval/accuracy" in metrics:
            accuracy = metrics["eval/accuracy"]
            text = "n/a" if accuracy is None else f"{accuracy:.3f}"
            self.text(f"step {step}: held-out accuracy {text}")
        if "reward_mean" in metrics or "loss" in metrics:
            self._step(int(step or 0), metrics)

    def text(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

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


class Tracker:
    """Sends metrics to the sinks that the config names. For one rank only: rank 0."""

    def __init__(
        self,
        config: RunConfig,
        *,
        num_steps: int | None = None,
    ) -> None:
        names = config.tracking.sinks
        metrics = RunDirectory.of(config.output_dir).metrics
        self._jsonl = JsonlSink(metrics) if "jsonl" in names else None
        steps = num_steps if num_steps is not None else config.train.num_steps
        self._console = ConsoleSink(steps) if "console" in names else None

    def log(self, metrics: Metrics) -> None:
        """One line of metrics; it needs a `step`. NaN and infinities become null."""
        clean = {name: _number(name, value) for name, value in metrics.items()}
        if "step" not in clean:
            raise ValueError(f"metrics without a step: {sorted(clean)}; add `step`")
        if self._jsonl is not None:
            self._jsonl.log(clean)
        if self._console is not None:
            self._console.log(clean)

    def progress(self, text: str) -> None:
        """A line for the person who watches; not a metric."""
        if self._console is not None:
            self._console.text(text)

    def close(self) -> None:
        if self._jsonl is not None:
            self._jsonl.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(name: str, value: Any) -> float | int | bool | None:
    if hasattr(value, "item"):  # a torch or numpy scalar
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metric {name}: found {value!r}, expected a number or a boolean")


def _format(value: Any, spec: str) -> str:
    if value is None:
        return "n/a".rjust(int(spec.split(".")[0].rstrip("def") or 0))
    return format(int(value) if spec == "d" else value, spec)
