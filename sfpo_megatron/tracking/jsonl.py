"""The sink `jsonl`: a line of RUN/metrics.jsonl a train step or evaluation, and one of
RUN/samples.jsonl a sampled prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sfpo_megatron.tracking.details import Details
from sfpo_megatron.tracking.sinks import Metrics, RunInfo


class JsonlSink:
    """Appends one line per call, and the file has it at once: a killed run keeps what it had."""

    def __init__(self, run: RunInfo) -> None:
        run.directory.metrics.parent.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        self._metrics = self._open.enter_context(Lines(run.directory.metrics))
        self._samples_file = run.directory.samples

    def log(self, metrics: Metrics) -> None:
        self._metrics.append(metrics)

    def text(self, line: str) -> None:
        """Progress lines are not metrics."""

    def details(self, details: Details) -> None:
        if not details.samples:
            return
        with Lines(self._samples_file) as lines:
            for sample in details.samples:
                lines.append({"step": details.step, **sample.to_json()})

    def close(self) -> None:
        self._open.close()


class Lines:
    """A file of JSON lines, to which whole lines are appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not buffered: a line is one write, so that a reader who follows the file never sees half
        # of one, and nothing is held back that a later flush could add to a line cut short.
        self._file = path.open("ab", buffering=0)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one object, which has a `step`. OSError: the file ends before it."""
        left = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        whole_lines = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # the disk is full: half a line would break the table at the end
            self._file.truncate(whole_lines)
            why = f"{error.strerror}; {self._path} ends before the line of step {line.get('step')}"
            raise OSError(error.errno, why) from error

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
