"""A model as it is named on the command line: Hugging Face files, a checkpoint, or a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.evaluation.records import EvaluationError
from sfpo_megatron.outputs.directory import RunDirectory

Which = Literal["best", "last"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Model:
    """What is evaluated."""

    name: str
    """The text that named it, for tables."""
    hf: Path
    """Its config.json and tokenizer: all of it, unless there is a checkpoint."""
    checkpoint: Path | None = None
    """torch_dist directory with its weights, which engines can read once they are converted."""

    @property
    def slug(self) -> str:
        """A folder name of its own for each model."""
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", self.name).strip("._")[-40:]
        return f"{plain}-{hashlib.sha256(str(self._source).encode()).hexdigest()[:6]}"

    @property
    def _source(self) -> Path:
        return (self.checkpoint or self.hf).absolute()

    def fingerprint(self) -> str:
        """Changes when the weights do: of names, sizes and times of the files, not their bytes."""
        files = sorted(
            path
            for path in self._source.iterdir()
            if path.is_file() and (path.suffix in (".safetensors", ".distcp", ".json"))
        )
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def find_model(text: str, which: Which) -> Model:
    """The model that `text` names; `which` is the checkpoint of a run that is meant.

    A run's last weights are RUN/hf if it has ended, else its newest checkpoint. EvaluationError if
    there is nothing that can be evaluated.
    """
    path = Path(text)
    if not path.exists():
        raise EvaluationError(
            f"{text}: found nothing there, expected a Hugging Face directory, a checkpoint or a run"
        )
    if (path / "config.json").is_file():
        return Model(name=text, hf=path)
    from sfpo_megatron.checkpoints.store import BEST, CheckpointError, pointed_at
    from sfpo_megatron.convert.locate import hf_files, locate

    run = RunDirectory(path)
    try:
        if which == "best":
            best = pointed_at(run.checkpoints, BEST)
            if best is None or not best.is_dir():
                raise EvaluationError(
                    f"{text}: found no checkpoint that {run.checkpoints.name}/{BEST} names, "
                    "expected a run that kept its best one (checkpoint.keep_best); take "
                    "--checkpoint last"
                )
            found = locate(best)
        elif (run.hf / "config.json").is_file() and not _newer_checkpoint(run):
            return Model(name=text, hf=run.hf)
        else:
            found = locate(path)
        return Model(name=text, hf=hf_files(found), checkpoint=found.directory)
    except CheckpointError as error:
        raise EvaluationError(
            f"{text}: found neither config.json nor a checkpoint ({error}), expected a Hugging "
            "Face directory, a checkpoint or a run"
        ) from error


def _newer_checkpoint(run: RunDirectory) -> bool:
    """Whether the run was continued after RUN/hf was written."""
    written = (run.hf / "config.json").stat().st_mtime
    manifests = run.checkpoints.glob(f"*/{manifest.NAME}")
    return any(path.stat().st_mtime > written for path in manifests)


@contextmanager
def as_files(model: Model, aside: Path) -> Iterator[Path]:
    """The model as a Hugging Face directory; a checkpoint is converted into `aside`, which is
    removed at the end."""
    if model.checkpoint is None:
        yield model.hf
        return
    import shutil

    from sfpo_megatron.convert.to_hf import megatron_to_hf

    shutil.rmtree(aside, ignore_errors=True)
    try:
        megatron_to_hf(model.checkpoint, aside, hf=model.hf)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
