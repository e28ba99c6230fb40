"""The sink `jsonl`: one line of RUN/metrics.jsonl a train step or evaluation."""

from __future__ import annotations

import json
import os

from sfpo_megatron.tracking.sinks import Metrics, RunInfo


class JsonlSink:
    """Appends one line per call, and the file has it at once: a killed run keeps what it had."""

    def __init__(self, run: RunInfo) -> None:
        self._path = run.directory.metrics
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not buffered: a line is one write, so that a reader who follows the file never sees half
        # of one, and nothing is held back that a later flush could add to a line cut short.
        self._file = self._path.open("ab", buffering=0)

    def log(self, metrics: Metrics) -> None:
        left = memoryview(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        whole_lines = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # the disk is full: half a line would break the table at the end
            self._file.truncate(whole_lines)
            step = metrics.get("step")
            why = f"{error.strerror}; {self._path} ends before the line of step {step}"
            raise OSError(error.errno, why) from error

    def text(self, line: str) -> None:
        """Progress lines are not metrics."""

    def close(self) -> None:
        self._file.close()
