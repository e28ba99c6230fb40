"""What a run continues from, and its directory made ready for that: before any engine starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sfpo_megatron.checkpoints.store import CheckpointStore, Found
from sfpo_megatron.checkpoints.store import at as checkpoint_at
from sfpo_megatron.config.load import dump_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.metrics import cut_metrics


def checkpoint_store(config: RunConfig) -> CheckpointStore:
    section = config.checkpoint
    return CheckpointStore(
        RunDirectory.of(config.output_dir).checkpoints,
        form=section.format,
        keep_last=section.keep_last,
        keep_best=section.keep_best,
    )


def find(config: RunConfig, store: CheckpointStore, control: ControlGroup) -> Found | None:
    """The checkpoint to continue from, on every rank; None for a new run. Rank 0 looks, and sets
    aside checkpoints that the run does not go on from. Collective."""
    if control.rank == 0:
        return _as_found(control.broadcast_json(_to_json(_look(config, store))))
    return _as_found(control.broadcast_json())


def _look(config: RunConfig, store: CheckpointStore) -> Found | None:
    if config.debug.rollout_only:
        return None
    resume, found = config.checkpoint.resume, None
    if resume == "auto":
        found = store.newest_good(warn)
    elif resume != "never":
        found = checkpoint_at(Path(resume))
    if found is None or not found.has_run_state:
        store.retire()
    else:
        store.abandon_after(found.step)
    return found


def _to_json(found: Found | None) -> list[Any] | None:
    if found is None:
        return None
    return [str(found.directory), found.step, found.has_run_state]


def _as_found(value: list[Any] | None) -> Found | None:
    if value is None:
        return None
    directory, step, has_run_state = value
    return Found(directory=Path(directory), step=step, has_run_state=has_run_state)


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def prepare_output(config: RunConfig, *, up_to_step: int = 0) -> RunDirectory:
    """Make output_dir, write config.yaml. An earlier run's metrics are kept under another name; of
    a run that continues after step `up_to_step`, the lines up to it stay where they are."""
    directory = RunDirectory.of(config.output_dir)
    directory.path.mkdir(parents=True, exist_ok=True)
    metrics = directory.metrics
    if up_to_step:
        cut_metrics(metrics, up_to_step)
    elif metrics.exists() and metrics.stat().st_size:
        number = len(list(directory.path.glob(f"{metrics.stem}.previous-*"))) + 1
        metrics.rename(metrics.with_name(f"{metrics.stem}.previous-{number}{metrics.suffix}"))
    aside = directory.config.with_name("config.yaml.tmp")
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.rename(directory.config)
    return directory
