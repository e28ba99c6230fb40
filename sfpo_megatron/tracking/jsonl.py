"""The sink `jsonl`: a line of RUN/metrics.jsonl a train step or evaluation, and one of
RUN/samples.jsonl a sampled prompt."""

from __future__ import annotations

from contextlib import ExitStack

from sfpo_megatron.outputs.json_lines import Lines
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
