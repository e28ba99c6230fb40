"""The sink `jsonl`: one line of RUN/metrics.jsonl a train step or evaluation."""

from __future__ import annotations

import json

from sfpo_megatron.tracking.sinks import Metrics, RunInfo


class JsonlSink:
    """Appends one line per call; each is flushed, so that a killed run keeps what it had."""

    def __init__(self, run: RunInfo) -> None:
        path = run.directory.metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        # One write of a whole line: a reader that follows the file never sees half of one
        # (lines are far below the buffer size, and flush hands the buffer over at once).
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def text(self, line: str) -> None:
        """Progress lines are not metrics."""

    def close(self) -> None:
        self._file.close()
