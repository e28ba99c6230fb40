"""The sink `tensorboard`: event files in RUN/tensorboard, one folder a run.

A run that is resumed goes on in its folder; TensorBoard then drops what was logged of the steps
after the checkpoint (`purge_step`).
"""

from __future__ import annotations

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sfpo_megatron.tracking.block import sample_block
from sfpo_megatron.tracking.details import Details
from sfpo_megatron.tracking.settings import settings
from sfpo_megatron.tracking.sinks import Metrics, RunInfo

_COMPARED = ("eval/accuracy", "reward_mean", "eval/loss", "loss")
"""Metrics that the page HPARAMS shows beside the settings, by their last value."""


class TensorBoardSink:
    """Scalars by the names in metrics.jsonl, the config as hyperparameters, progress as text."""

    def __init__(self, run: RunInfo) -> None:
        folder = run.directory.tensorboard / (run.run_id or "rollouts")
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=run.first_step)
        self._step = run.continued_step
        # Not `add_hparams`: that makes a second run with values of its own.
        experiment, start, self._end = hparams(settings(run.config), dict.fromkeys(_COMPARED, 0.0))
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(start)
        if run.directory.config.exists():
            self._add_text("config", run.directory.config.read_text(encoding="utf-8"))
        self._writer.flush()

    def log(self, metrics: Metrics) -> None:
        self._step = int(metrics["step"] or 0)
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, self._step)
        self._writer.flush()  # a killed run keeps what it had

    def text(self, line: str) -> None:
        self._add_text("progress", line)

    def details(self, details: Details) -> None:
        for name, values in details.distributions.items():
            self._writer.add_histogram(f"distribution/{name}", np.asarray(values), details.step)
        if details.samples:
            self._add_text("samples", sample_block(details.step, details.samples))
        self._writer.flush()

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()

    def _add_text(self, tag: str, text: str) -> None:
        """Text with its columns: what is indented is shown as it is."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(tag, indented, self._step)
