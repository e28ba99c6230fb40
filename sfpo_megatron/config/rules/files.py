"""Rules of check.py about what a run reads and writes, other than the model. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from sfpo_megatron.config.data import DataSource
from sfpo_megatron.config.load import is_dumped
from sfpo_megatron.config.paths import NOT_DIRECTORIES
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.source_files import ENDINGS, files_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.exported import RUN_TOOL, exported_names
from sfpo_megatron.outputs.owned import NotOurs, check_owned, overlaps
from sfpo_megatron.plugins import SOURCE


def data(config: RunConfig) -> Iterator[Problem]:
    """Prompts."""
    without_pyarrow = []
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            key = f"data.{part}.{index}"
            yield from _reward_of(config, source, key)
            if source.source == "reasoning_gym" or source.source not in SOURCE.built_in:
                continue  # generated, or a user's own
            yield from _files_of(source, key)
            if source.source == "parquet" and not find_spec("pyarrow"):
                without_pyarrow.append(key)
    if without_pyarrow:  # once is enough
        yield Problem(
            f"{without_pyarrow[0]}.source",
            "parquet, and no pyarrow in this Python",
            "pyarrow to read it",
            "pip install pyarrow, or convert the file to jsonl",
            "error_here",
        )
    if not config.data.eval:
        yield Problem(
            "data.eval",
            "no source",
            "held-out prompts",
            "without them there is no eval/accuracy",
            "warning",
        )


def _reward_of(config: RunConfig, source: DataSource, key: str) -> Iterator[Problem]:
    """Whether the rows of a source have what its reward reads."""
    reward_key = "reward.function" if source.reward is None else f"{key}.reward"
    rewards = config.reward.summands(source.reward)
    if source.source == "reasoning_gym" or all(one.name != "reasoning_gym" for one in rewards):
        return
    found = f"reasoning_gym with {key}.source {source.source}"
    if source.source in SOURCE.built_in:
        yield Problem(
            reward_key,
            found,
            "a reward that only needs the answer",
            f"set {reward_key} to math, exact_match or last_number",
            "error_when_rewarding",
        )
    else:
        yield Problem(
            reward_key,
            found,
            "rows that have the columns task, args and entry of a reasoning-gym problem",
            f"if they have not, set {reward_key} to one that only needs the answer",
            "warning",
        )


def _files_of(source: DataSource, key: str) -> Iterator[Problem]:
    """Whether a source's files, and the library that reads them, are there."""
    if source.source == "hf" and not find_spec("datasets"):
        yield Problem(
            f"{key}.source",
            "hf, and no library datasets in this Python",
            "datasets to read it",
            "pip install 'sfpo-megatron[datasets]' (or datasets alone)",
            "error_here",
        )
    if source.source not in ENDINGS:
        return
    files = files_of(source.source, source.path or "")
    astray = next((file for file in files if not file.is_file()), None)
    if astray is not None or not files:
        yield Problem(
            f"{key}.path",
            f"no file {source.path!r} in {Path.cwd()}"
            if astray is None
            else f"{str(astray)!r}, a link that leads nowhere",
            f"a {source.source} file, a directory of them, or a glob",
            "correct the path (it is relative to the current directory)",
            "error_when_training",
        )


def outputs(config: RunConfig) -> Iterator[Problem]:
    """output_dir, and saved rollouts to train on."""
    run = RunDirectory.of(config.output_dir)
    yield from _in_the_way(run.path)
    yield from _in_its_place(run)
    yield from _config_of_others(run)
    for folder in (run.path, run.logs, run.checkpoints):
        if folder == run.path or folder.is_dir():
            yield from _not_writable(folder)
    if run.path.resolve() == Path(config.model.path).resolve():
        yield Problem(
            "output_dir",
            f"{config.output_dir!r}, which is model.path",
            "a folder of its own",
            "choose another output_dir: the run would write over the model",
        )
    yield from _exported(config, run)
    rollouts = config.debug.train_only
    if rollouts is not None and not Path(rollouts).is_file():
        yield Problem(
            "debug.train_only",
            f"no file {rollouts!r}",
            "rollouts written by debug.save_rollouts",
            "correct the path, or make the file with debug.save_rollouts first",
        )


def _exported(config: RunConfig, run: RunDirectory) -> Iterator[Problem]:
    """Whether RUN/hf can be written at the end. `eval` only reads, so a model there is its own."""
    model = Path(config.model.path)
    for folder in (run.hf, run.checkpoints, run.logs, run.slurm):
        if how := overlaps(folder, model):
            yield Problem(
                "model.path",
                f"{config.model.path!r}: {folder}, which a run of output_dir writes, {how} it",
                "a model outside of what the run writes",
                "choose another output_dir, or copy the model",
                "error_when_writing",
            )
            return
    if config.debug.rollout_only or any(_in_the_way(run.path)) or any(_not_writable(run.path)):
        return
    try:
        check_owned(run.hf, tool=RUN_TOOL, inputs=(model,), adopts=exported_names(model))
    except NotOurs as error:
        found, _, rest = str(error).partition(", expected ")
        expected, _, fix = rest.partition("; ")
        found = found.replace(": found ", ": ", 1)
        yield Problem("output_dir", found, expected, fix, "error_when_writing")


def _in_the_way(output: Path) -> Iterator[Problem]:
    for folder in (output, *output.parents):
        what = "a file" if os.path.exists(folder) else "a link to nothing"
        if os.path.lexists(folder) and not os.path.isdir(folder):
            yield Problem(
                "output_dir", f"{what} at {str(folder)!r}", "a folder", "choose another output_dir"
            )


def _in_its_place(run: RunDirectory) -> Iterator[Problem]:
    """What has the name of a file or folder of the run and is not one."""
    for folder in (run.logs, run.checkpoints):
        if os.path.lexists(folder) and not folder.is_dir():
            yield Problem(
                "output_dir",
                f"{str(folder)!r}, which is no folder",
                "a folder, or nothing",
                "move it away, or choose another output_dir",
            )
    for file in (run.config, run.record, run.metrics, run.evals, run.lock):
        if os.path.lexists(file) and not file.is_file():
            yield Problem(
                "output_dir",
                f"{str(file)!r}, which is no file",
                "a file, or nothing",
                "move it away, or choose another output_dir",
            )
        elif file.exists() and not os.access(file, os.W_OK):
            yield Problem(
                "output_dir",
                f"{str(file)!r}, where this user may not write",
                "a file that can be written",
                "choose another output_dir, or change its permissions",
                "error_when_training",
            )


def _config_of_others(run: RunDirectory) -> Iterator[Problem]:
    """A config.yaml of the user's where the run writes its own; a run that has been here knows."""
    begun = any(path.exists() for path in (run.record, run.metrics, run.checkpoints, run.logs))
    if run.config.is_file() and not begun and not is_dumped(run.config):
        yield Problem(
            "output_dir",
            f"{str(run.config)!r}, which no run has written",
            "no file of that name: the run writes its own config.yaml there",
            "rename it, or choose another output_dir",
            "error_when_writing",
        )


def _not_writable(output: Path) -> Iterator[Problem]:
    """Whether a run could write there, as far as can be told without writing."""
    folder = next(path for path in (output, *output.parents) if os.path.exists(path))
    if not folder.is_dir() or os.access(folder, os.W_OK | os.X_OK):
        return
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    yield Problem(
        "output_dir",
        f"{str(folder)!r}, "
        + ("on a read-only file system" if read_only else "where this user may not write"),
        "a folder that can be written",
        "choose another output_dir" + ("" if read_only else ", or change its permissions"),
        "error_when_training",
    )


def checkpoints(config: RunConfig) -> Iterator[Problem]:
    """What to continue from, and when to save."""
    checkpoint = config.checkpoint
    # A run that has begun continues from its own: retention may have removed what it began from.
    begun = RunDirectory.of(config.output_dir).record.exists()
    named = checkpoint.resume not in NOT_DIRECTORIES
    if named and not begun and not Path(checkpoint.resume).is_dir():
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
