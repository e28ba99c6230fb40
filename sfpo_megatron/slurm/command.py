"""`sfpo-megatron slurm`: load, check, lay out, render, submit."""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.checkpoints.identity import outlook
from sfpo_megatron.checkpoints.store import CheckpointError, store_of
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.paths import PathError, expand
from sfpo_megatron.config.rules.model import model_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import WrongInput
from sfpo_megatron.host.gpus import GPUS_PER_NODE
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.planner.nodes import (
    JobLayout,
    LayoutError,
    check_engines,
    crossing_advice,
    idle_advice,
    job_layout,
)
from sfpo_megatron.planner.saving import saving_advice
from sfpo_megatron.slurm.more_options import check_more
from sfpo_megatron.slurm.render import SIGNAL_MARGIN_S, TEMPLATES, Job, render
from sfpo_megatron.slurm.submit import TIMEOUT_S, SubmitError, submit
from sfpo_megatron.slurm.walltime import format_time, parse_time

DEFAULT_SAVE_BUDGET_S = 300


class SlurmError(ValueError, WrongInput):
    """One option is wrong, or Slurm did not take the job."""


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `slurm` alone."""
    command.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    command.add_argument("--time", required=True, help="time limit, as sbatch takes it: 4:00:00")
    command.add_argument(
        "--job",
        choices=("train", "eval"),
        default="train",
        help="train (the default), or only the held-out prompts through engines",
    )
    command.add_argument(
        "--gpus-per-node",
        type=int,
        default=GPUS_PER_NODE,
        metavar="N",
        help=f"default: {GPUS_PER_NODE}",
    )
    command.add_argument(
        "--train-nodes",
        type=int,
        metavar="N",
        help="nodes with trainer ranks; default: all when engines are colocated, else as few as "
        "hold the same number of ranks each; with parallel.data null, what the engines leave",
    )
    command.add_argument("--env", metavar="FILE", help="your copy of launch/slurm/env.sh")
    command.add_argument(
        "--save-budget",
        type=int,
        metavar="SECONDS",
        help="what a run that is asked to stop may take to save (default: "
        "checkpoint.must_save_within_s, else checkpoint.stop_before_walltime_s, at least "
        f"{DEFAULT_SAVE_BUDGET_S})",
    )
    command.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="failures in a row, without a new checkpoint, before the job gives up (default: 3)",
    )
    command.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, such as --sbatch=--partition=h100; may be repeated",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print the script, write and submit nothing"
    )
    command.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)  # is refused


def slurm(options: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or SlurmError before anything is written."""
    if options.fresh:
        raise SlurmError(
            "--fresh: found it for a job, expected a command that a requeue can run again; choose "
            "another output_dir, or move its run.json and checkpoints away first"
        )
    config = load_config(options.config, options.overrides)
    run = RunDirectory.of(config.output_dir)
    config = dataclasses.replace(config, output_dir=str(run.path))
    _check_counts(options)
    _check_more_sbatch(options)
    env_file = _env_file(options)
    save_budget_s = _save_budget_s(options, config)
    if options.job == "train":
        config = _saved_within(save_budget_s, config)
    try:
        layout = None
        if options.job == "train":
            layout = job_layout(
                config,
                nodes=options.nodes,
                gpus_per_node=options.gpus_per_node,
                train_nodes=options.train_nodes,
            )
        else:
            check_engines(_alone(config), nodes=options.nodes, gpus_per_node=options.gpus_per_node)
        job = Job(
            script=options.job,
            nodes=options.nodes,
            time=options.time,
            gpus_per_node=options.gpus_per_node,
            work_dir=Path.cwd(),
            python=sys.executable,
            save_budget_s=save_budget_s,
            max_failures=options.max_failures,
            accept_data_change=options.accept_data_change,
            env_file=env_file,
            more_sbatch=tuple(options.sbatch),
        )
        _check_time(job)
        for warning in check_config(
            config,
            file=options.config,
            world_size=layout.world_size if layout else None,
            for_training=layout is not None,
            on_cpu=False,  # nodes have GPUs; the job looks there for what this machine lacks
        ):
            print(warning, file=sys.stderr)
        files = render(config, job, layout)
        if layout is not None:
            plan = outlook(config, store_of(config), fresh=False)
            print(f"the job {plan}", file=sys.stderr)
            for advice in filter(None, _advice(options, config, layout)):
                print(f"warning: {advice}", file=sys.stderr)
        script = f"{job.script}.sbatch"
        if options.dry_run:
            print(files[script], end="")
            return 0
        number = submit(run, script, files)
    except (CheckpointError, LayoutError, SubmitError) as error:
        raise SlurmError(str(error)) from error
    print(f"submitted job {number}: {run.slurm / script}; its log: {run.slurm / f'{number}.out'}")
    return 0


def _save_budget_s(options: argparse.Namespace, config: RunConfig) -> int:
    """Seconds that Slurm leaves the run to stop and save: those that the config counts on."""
    checkpoint, given = config.checkpoint, options.save_budget
    limit = checkpoint.must_save_within_s
    if given is None:
        asked_early = max(checkpoint.stop_before_walltime_s or 0, DEFAULT_SAVE_BUDGET_S)
        return math.ceil(limit or asked_early)
    if limit is not None and limit > given and options.job == "train":
        raise SlurmError(
            f"--save-budget: found {given} with checkpoint.must_save_within_s {limit:g}, expected "
            f"{math.ceil(limit)} or more: the run would count on time that Slurm does not leave "
            "it; raise it or leave it out, or lower that key"
        )
    return int(given)


def _saved_within(save_budget_s: int, config: RunConfig) -> RunConfig:
    """The run as it has to stop in a job: a step that the budget is too short for is given up. One
    that went on would be ended by Slurm, without a save and without a requeue."""
    checkpoint = config.checkpoint
    if not config.saves_state or checkpoint.must_save_within_s is not None:
        return config
    checkpoint = dataclasses.replace(checkpoint, must_save_within_s=float(save_budget_s))
    return dataclasses.replace(config, checkpoint=checkpoint)


def _advice(
    options: argparse.Namespace, config: RunConfig, layout: JobLayout
) -> Iterator[str | None]:
    """What is worth a warning of a job that trains."""
    yield idle_advice(
        config,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        train_nodes=options.train_nodes,
    )
    yield crossing_advice(config, layout)
    if not config.saves_state:
        key = "debug.rollout_only" if config.debug.rollout_only else "checkpoint.every"
        found = "true" if config.debug.rollout_only else "0"
        yield (
            f"{key}: found {found}, expected a run that saves: this one ends with the job's time, "
            "and begins again at step 1 where the job is requeued"
        )
        return
    data = layout.world_size // config.parallel.model_size
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=data))
    shape = model_of(config, file=options.config)
    yield saving_advice(shape, config, job_s=parse_time(options.time))


def _alone(config: RunConfig) -> RunConfig:
    """The run as `eval` starts it: engines alone, whatever its trainer would do with them."""
    rollout = dataclasses.replace(config.rollout, placement="dedicated")
    debug = dataclasses.replace(config.debug, train_only=None)
    return dataclasses.replace(config, rollout=rollout, debug=debug)


def _check_counts(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "max_failures", "train_nodes", "save_budget"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SlurmError(f"--{name.replace('_', '-')}: found {value}, expected 1 or more")


def _check_more_sbatch(options: argparse.Namespace) -> None:
    try:
        check_more(options.sbatch, gpus_per_node=options.gpus_per_node)
    except ValueError as error:
        raise SlurmError(f"--sbatch: {error}") from error


def _env_file(options: argparse.Namespace) -> Path:
    """The file of `--env`, read by bash without being run: its first mistake costs no job."""
    if not options.env:
        return TEMPLATES / "env.sh"
    try:
        env_file = Path(expand(options.env))
    except PathError as error:
        raise SlurmError(f"--env: {error}") from error
    try:
        if not env_file.is_file():
            raise SlurmError(f"--env: found no file {env_file}, expected your copy of env.sh")
        has_carriage_returns = b"\r\n" in env_file.read_bytes()
        read = subprocess.run(
            ["bash", "-n", "--", env_file], capture_output=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"--env: found {error}, expected a file that bash can read") from error
    if has_carriage_returns:
        raise SlurmError(
            f"--env: found lines of {env_file} that end as on Windows (CRLF), expected LF alone: "
            f"bash takes the rest for a part of each value; sed -i 's/\\r$//' {env_file}"
        )
    if read.returncode:
        said = read.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise SlurmError(f"--env: found {said}, expected what bash can read; correct that line")
    return env_file


def _check_time(job: Job) -> None:
    try:
        seconds = parse_time(job.time)
    except ValueError as error:
        raise SlurmError(f"--time: {error}") from error
    kept = job.save_budget_s + SIGNAL_MARGIN_S if job.script == "train" else 0
    if seconds <= kept:
        raise SlurmError(
            f"--time: found {job.time}, expected more than the {format_time(kept)} that are kept "
            "for the last save; raise it or lower --save-budget"
        )
