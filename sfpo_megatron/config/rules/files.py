"""Rules of check.py about what a run reads and writes, other than the model. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig


def data(config: RunConfig) -> Iterator[Problem]:
    """Prompts."""
    told = False
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            if source.source not in ("jsonl", "parquet"):
                continue  # generated, or a user's own
            key = f"data.{part}.{index}"
            if not Path(source.path or "").expanduser().is_file():
                yield Problem(
                    f"{key}.path",
                    f"no file {source.path!r} in {Path.cwd()}",
                    f"a {source.source} file",
                    "correct the path (it is relative to the current directory)",
                    "error_when_training",
                )
            if source.source == "parquet" and not find_spec("pyarrow") and not told:
                told = True  # once is enough
                yield Problem(
                    f"{key}.source",
                    "parquet, and no pyarrow in this Python",
                    "pyarrow to read it",
                    "pip install pyarrow, or convert the file to jsonl",
                    "error_when_training",
                )
            if config.reward.function == "reasoning_gym":
                yield Problem(
                    "reward.function",
                    f"reasoning_gym with {key}.source {source.source}",
                    "a reward that only needs the answer",
                    "set reward.function to math, exact_match or last_number",
                )
    if not config.data.eval:
        yield Problem(
            "data.eval",
            "no source",
            "held-out prompts",
            "without them there is no eval/accuracy",
            "warning",
        )


def outputs(config: RunConfig) -> Iterator[Problem]:
    """output_dir, and saved rollouts to train on."""
    output = Path(config.output_dir).expanduser()
    for folder in (output, *output.parents):
        if folder.exists() and not folder.is_dir():
            yield Problem(
                "output_dir", f"a file at {str(folder)!r}", "a folder", "choose another output_dir"
            )
    if output.resolve() == Path(config.model.path).expanduser().resolve():
        yield Problem(
            "output_dir",
            f"{config.output_dir!r}, which is model.path",
            "a folder of its own",
            "choose another output_dir: the run would write over the model",
        )
    rollouts = config.debug.train_only
    if rollouts is not None and not Path(rollouts).expanduser().is_file():
        yield Problem(
            "debug.train_only",
            f"no file {rollouts!r}",
            "rollouts written by debug.save_rollouts",
            "correct the path, or make the file with debug.save_rollouts first",
        )


def checkpoints(config: RunConfig) -> Iterator[Problem]:
    """What to continue from, and when to save."""
    checkpoint = config.checkpoint
    if (
        checkpoint.resume not in ("auto", "never")
        and not Path(checkpoint.resume).expanduser().is_dir()
    ):
        yield Problem(
            "checkpoint.resume",
            f"no directory {checkpoint.resume!r} in {Path.cwd()}",
            "auto, never, or the directory of a checkpoint",
            "correct the path",
        )
    if checkpoint.every == 0 and (
        checkpoint.must_save_within_s or checkpoint.stop_before_walltime_s
    ):
        yield Problem(
            "checkpoint.every",
            "0 with a time limit for the last save",
            "1 or more",
            "set checkpoint.every, or remove must_save_within_s and stop_before_walltime_s",
        )
    if checkpoint.stop_before_walltime_s and "SLURM_JOB_ID" not in os.environ:
        yield Problem(
            "checkpoint.stop_before_walltime_s",
            "no Slurm job around this process",
            "SLURM_JOB_END_TIME, which Slurm sets in a job",
            "it has no effect here",
            "warning",
        )
