"""What a run continues from, and its directory made ready for that: before any engine starts."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfpo_megatron.checkpoints.identity import (
    Kind,
    RunRecord,
    kind_of,
    kind_there,
    not_of_the_run,
    refuse_other_reference,
    retire_metrics,
    retire_run,
    run_id_of,
)
from sfpo_megatron.checkpoints.store import CheckpointError, CheckpointStore, Found, store_of
from sfpo_megatron.checkpoints.store import at as checkpoint_at
from sfpo_megatron.config.load import dump_config, is_dumped
from sfpo_megatron.config.paths import NOT_DIRECTORIES
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.replacing import replacing, set_aside
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.metrics import cut_metrics


@dataclass(kw_only=True, frozen=True, slots=True)
class Start:
    """How a run starts; the same on every rank."""

    found: Found | None
    """The checkpoint that it continues from; None for a new run."""
    run_id: str
    """Empty where nothing can be continued later (debug.rollout_only)."""
    said: str
    """What the run says of it."""

    @property
    def continued(self) -> Found | None:
        """The checkpoint whose run goes on; None where it gives the weights alone."""
        found = self.found
        return found if found is not None and found.has_run_state else None

    @property
    def continued_step(self) -> int:
        """The train step after which the run goes on; 0 for a new run."""
        return self.continued.step if self.continued is not None else 0


def find(
    config: RunConfig,
    store: CheckpointStore,
    control: ControlGroup,
    *,
    fresh: bool = False,
    kind: Kind = "train",
) -> Start:
    """How to start, on every rank. Rank 0 looks, sets aside what the run does not go on from, and
    writes RUN/run.json. Collective."""
    if control.rank == 0:
        start = decide(config, store, fresh=fresh, kind=kind)
        return _as_start(control.broadcast_json(_to_json(start)))
    return _as_start(control.broadcast_json())


def decide(
    config: RunConfig, store: CheckpointStore, *, fresh: bool, kind: Kind = "train"
) -> Start:
    """How to start: a run that has begun continues from its newest checkpoint, whatever
    checkpoint.resume says, which is for the first start. A `train` sets a warm start aside; an
    `sft` refuses to do so with a run that has checkpoints."""
    directory, resume = RunDirectory.of(config.output_dir), config.checkpoint.resume
    if fresh and (restarted := _restarted()):
        warn(f"--fresh is for the first start, found {restarted}: the run continues")
        fresh = False
    if config.debug.rollout_only:
        if fresh:
            retire_run(directory, store)
        return Start(found=None, run_id="", said="rollouts only")
    store.recover()
    record = None if fresh else RunRecord.read(directory)
    there = None if fresh else kind_there(record, store)
    if there == "sft" and kind == "train":
        start = _first_start(config, store, None, fresh=True, kind=kind)
        return dataclasses.replace(
            start, said=f"{start.said}; the warm start that was here is kept as *.previous-N"
        )
    if there == "train" and kind == "sft":
        _refuse_run(directory, store)
        record = None
    if record is not None and store.steps():
        return _continued(store, record, resume)
    if record is None and not fresh and resume == "auto" and store.steps():
        found = store.newest_good(warn)
        assert found is not None, "newest_good raises where all are broken"
        record = _record_of(found, kind)
        record.write(directory)
        return Start(found=found, run_id=record.run_id, said=_goes_on(record, found))
    if not fresh:
        store.refuse_unusable(begun=record is not None, resume=resume)
    return _first_start(config, store, record, fresh=fresh, kind=kind)


def _refuse_run(directory: RunDirectory, store: CheckpointStore) -> None:
    """A warm start does not go on top of a run: CheckpointError where that has checkpoints."""
    if steps := store.steps():
        raise CheckpointError(
            f"output_dir: found the checkpoints of a run in {directory.path} (the last of step "
            f"{max(steps)}), expected a directory without; choose another for the warm start, or "
            "set the run aside with --fresh"
        )


def _continued(store: CheckpointStore, record: RunRecord, resume: str) -> Start:
    found = store.newest_good(warn)
    assert found is not None, "newest_good raises where all are broken"
    run_id = run_id_of(found.directory)
    if not record.owns(run_id):
        raise not_of_the_run(found.directory, run_id, record)
    said = _goes_on(record, found)
    if resume != "auto":
        said += f" (checkpoint.resume={resume} was for its first start; --fresh sets it aside)"
    return Start(found=found, run_id=record.run_id, said=said)


def _first_start(
    config: RunConfig,
    store: CheckpointStore,
    record: RunRecord | None,
    *,
    fresh: bool,
    kind: Kind,
) -> Start:
    """By checkpoint.resume. `record`: of a run that ended before its first checkpoint."""
    directory, resume = RunDirectory.of(config.output_dir), config.checkpoint.resume
    found = None if resume in NOT_DIRECTORIES else checkpoint_at(store.where(Path(resume)))
    if found is not None and found.has_run_state and kind_of(found.directory) != kind:
        found = dataclasses.replace(found, has_run_state=False)  # its weights alone
    if found is not None and not found.has_run_state and kind == "train":
        refuse_other_reference(config, found)
    own = found is not None and found.directory.resolve().parent == store.folder.resolve()
    if found is not None and own and found.has_run_state and not fresh:
        store.abandon_after(found.step)
        record = _record_of(found, kind)
    else:
        aside = retire_run(directory, store) if fresh else store.retire()
        if found is not None and own and aside is not None:  # it has moved along
            found = dataclasses.replace(found, directory=aside / found.directory.name)
        record = record or RunRecord.new(kind=kind)
    record.write(directory)
    begins = f"run {record.run_id} begins"
    said = f"{begins} from {found.directory}" if found is not None else begins
    return Start(found=found, run_id=record.run_id, said=said)


def _record_of(found: Found, kind: Kind) -> RunRecord:
    """The record of the run that wrote a checkpoint, where RUN has none."""
    run_id = run_id_of(found.directory)
    return RunRecord.new(run_id=run_id, adopted=run_id is None, kind=kind)


def _goes_on(record: RunRecord, found: Found) -> str:
    return f"run {record.run_id} continues after step {found.step}"


def _restarted() -> str:
    """The variable that says that somebody runs an old command again; empty if none does."""
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if (value := os.environ.get(name, "0")) not in ("", "0"):
            return f"{name}={value}"
    return ""


def _to_json(start: Start) -> list[Any]:
    found = start.found
    there = None if found is None else [str(found.directory), found.step, found.has_run_state]
    return [there, start.run_id, start.said]


def _as_start(value: list[Any]) -> Start:
    there, run_id, said = value
    found = None
    if there is not None:
        directory, step, has_run_state = there
        found = Found(directory=Path(directory), step=step, has_run_state=has_run_state)
    return Start(found=found, run_id=run_id, said=said)


def warn(text: str) -> None:
    """Print a warning in a line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def prepare_output(config: RunConfig, *, up_to_step: int = 0) -> RunDirectory:
    """Make output_dir, write config.yaml. An earlier run's metrics are kept under another name; of
    a run that continues after step `up_to_step`, the lines up to it stay where they are.
    CheckpointError for rollouts alone beside a run that would continue on top of their metrics."""
    directory = RunDirectory.of(config.output_dir)
    if config.debug.rollout_only and (steps := store_of(config).steps()):
        raise CheckpointError(
            f"output_dir: found the checkpoints of a run in {directory.path} (the last of step "
            f"{max(steps)}) with debug.rollout_only, expected a directory without; choose another "
            "output_dir, or set the run aside with --fresh"
        )
    directory.path.mkdir(parents=True, exist_ok=True)
    if up_to_step:
        cut_metrics(directory.metrics, up_to_step)
        cut_metrics(directory.samples, up_to_step)
    else:
        retire_metrics(directory)
    if directory.config.exists() and not is_dumped(directory.config):
        kept = set_aside(directory.config, "previous")
        warn(f"{directory.config} was not as a run writes it (edited?): kept as {kept.name}")
    with replacing(directory.config) as aside:
        aside.write_text(dump_config(config), encoding="utf-8")
    return directory
