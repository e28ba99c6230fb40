"""Which run this is: RUN/run.json, made once when a run begins, and the same id in the
run_state.json of each of its checkpoints. No torch; rank 0 alone writes here.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sfpo_megatron.checkpoints.store import (
    RUN_STATE,
    CheckpointError,
    CheckpointStore,
    Found,
    named_at,
)
from sfpo_megatron.config.paths import NOT_DIRECTORIES
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.replacing import set_aside, sync_directory, write_durably
from sfpo_megatron.outputs.directory import RunDirectory

Kind = Literal["train", "sft"]
"""The command that makes a run: neither goes on with a run of the other, but may take weights."""

FORMAT = 2
"""The number in run.json and run_state.json. The format before had neither it nor an id."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RunRecord:
    """What RUN/run.json says."""

    run_id: str
    started: str
    adopted: bool = False
    """Whether the run was begun by the format before: its checkpoints then have no id."""
    format: int = FORMAT
    data_changes: tuple[dict[str, Any], ...] = ()
    """Changes of the training data that were accepted: time, after_step, fingerprints then and now,
    and what has changed."""
    kind: Kind = "train"

    @staticmethod
    def new(*, run_id: str | None = None, adopted: bool = False, kind: Kind = "train") -> RunRecord:
        """The record of a run that begins now, or is first met now."""
        run_id = run_id or uuid.uuid4().hex[:12]
        return RunRecord(run_id=run_id, started=_now(), adopted=adopted, kind=kind)

    @staticmethod
    def read(directory: RunDirectory) -> RunRecord | None:
        """The record in RUN; None where there is none. CheckpointError if it cannot be used."""
        file = directory.record
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            check_format(file, found)
            run_id, started, adopted = found["run_id"], found["started"], found["adopted"]
            if not (isinstance(run_id, str) and run_id and isinstance(adopted, bool)):
                raise TypeError("run_id or adopted")
            data_changes = tuple(dict(one) for one in found.get("data_changes", ()))
            kind = _kind_in(found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: found something else ({error}), expected the record of this run; remove "
                "the file and start once with checkpoint.resume=auto to take the run from its "
                "checkpoints, or set the run aside with --fresh"
            ) from error
        return RunRecord(
            run_id=run_id,
            started=str(started),
            adopted=adopted,
            data_changes=data_changes,
            kind=kind,
        )

    def write(self, directory: RunDirectory) -> None:
        """Replace RUN/run.json in one step."""
        directory.path.mkdir(parents=True, exist_ok=True)
        write_durably(directory.record, json.dumps(asdict(self), indent=1) + "\n")
        sync_directory(directory.path)

    def with_data_change(self, *, after_step: int, then: str, now: str, what: str) -> RunRecord:
        """The record with one more accepted change of the data."""
        change = {"time": _now(), "after_step": after_step, "then": then, "now": now, "what": what}
        return replace(self, data_changes=(*self.data_changes, change))

    def accepted(self, *, then: str, now: str) -> bool:
        """Whether this change of the data has been accepted before."""
        return any((c.get("then"), c.get("now")) == (then, now) for c in self.data_changes)

    def owns(self, run_id: str | None) -> bool:
        """Whether a checkpoint with this id is of this run; None: of the format before."""
        return self.adopted if run_id is None else run_id == self.run_id


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_format(file: Path, found: Any) -> None:
    """CheckpointError if `found` was written by a later version."""
    number = found.get("format", 1) if isinstance(found, dict) else 1
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"{file}: found format {number}, expected {FORMAT} or before; continue with the "
            "version that wrote it, or set the run aside with --fresh"
        )


def _kind_in(found: dict[str, Any]) -> Kind:
    return "sft" if found.get("kind") == "sft" else "train"


def kind_of(checkpoint: Path) -> Kind:
    """The command whose run wrote a checkpoint. CheckpointError as `run_id_of`."""
    return _kind_in(_state_of(checkpoint))


def kind_there(record: RunRecord | None, store: CheckpointStore) -> Kind | None:
    """The command whose run is in RUN; None where there is none. A checkpoint that cannot be read
    counts as `train`'s: whoever reads it says what is wrong."""
    if record is not None:
        return record.kind
    steps = store.steps()
    if not steps:
        return None
    try:
        return kind_of(steps[max(steps)])
    except CheckpointError:
        return "train"


def run_id_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; None for one of the format before."""
    found = _state_of(checkpoint).get("run_id")
    return found if isinstance(found, str) else None


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """run_state.json, empty where there is none or it is no object."""
    file = checkpoint / RUN_STATE
    if not file.is_file():
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file}: {error}, expected the state of a run; choose another checkpoint"
        ) from error
    check_format(file, state)
    return state if isinstance(state, dict) else {}


def retire_run(directory: RunDirectory, store: CheckpointStore) -> Path | None:
    """Set aside the run in RUN: record, metrics, policy and checkpoints, under *.previous-N.
    Nothing is deleted. Returns the new path of its checkpoints."""
    if directory.record.exists():
        set_aside(directory.record, "previous")
    # The end of the new run would replace it, and a run without checkpoints has nothing else.
    if directory.hf.is_dir() and any(directory.hf.iterdir()):
        set_aside(directory.hf, "previous")
    retire_metrics(directory)
    return store.retire()


def retire_metrics(directory: RunDirectory) -> None:
    """Keep metrics.jsonl of an earlier run as metrics.previous-N.jsonl, and samples.jsonl so."""
    for file in (directory.metrics, directory.samples):
        if file.exists() and file.stat().st_size:
            set_aside(file, "previous", keeps_suffix=True)


def refuse_other_reference(config: RunConfig, found: Found) -> None:
    """The reference of the KL penalty is read from model.path at every start: CheckpointError where
    a `train` would begin from other weights."""
    if config.objective.kl.coef > 0:
        raise CheckpointError(
            f"checkpoint.resume: found {found.directory}, which gives its weights alone, with "
            f"objective.kl.coef {config.objective.kl.coef:g}, expected weights from model.path: "
            "the penalty's reference would be model.path, not what the run begins from; set "
            "model.path to these weights (the hf/ that sft has written, or "
            "tools/convert_megatron_to_hf.py makes it), or objective.kl.coef: 0"
        )


def not_of_the_run(directory: Path, run_id: str | None, record: RunRecord) -> CheckpointError:
    """What to raise of a checkpoint in RUN that another run has written."""
    of_whom = "the format before, without an id" if run_id is None else f"run {run_id}"
    return CheckpointError(
        f"{directory}: found a checkpoint of {of_whom}, expected one of run {record.run_id}, as "
        "run.json says; move it away, or begin a run from it with --fresh "
        f"checkpoint.resume={directory}"
    )


def outlook(config: RunConfig, store: CheckpointStore, *, fresh: bool) -> str:
    """What a `train` would do, in one line: by names alone, no checkpoint is read through.

    CheckpointError where it would refuse to.
    """
    directory, resume = RunDirectory.of(config.output_dir), config.checkpoint.resume
    if config.debug.rollout_only:
        return "makes rollouts only"
    steps = store.steps()
    newest = max(steps, default=0)
    record = None if fresh else RunRecord.read(directory)
    if fresh:
        _check_beginning(config, store)
        there = bool(steps) or directory.record.exists()
        return f"--fresh sets aside the run in {directory.path}" if there else "begins a new run"
    if kind_there(record, store) == "sft":
        _check_beginning(config, store)
        return f"sets aside the warm start in {directory.path} and begins a new run"
    if steps and (record is not None or resume == "auto"):
        try:
            run_id = run_id_of(steps[newest])
        except CheckpointError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            return f"continues before step {newest}, whose checkpoint is broken, if it can"
        if record is not None and not record.owns(run_id):
            raise not_of_the_run(steps[newest], run_id, record)
        whose = record.run_id if record is not None else run_id or "of the format before"
        return f"continues run {whose} after step {newest}"
    store.refuse_unusable(begun=record is not None, resume=resume)
    _check_beginning(config, store)
    from_there = "" if resume in NOT_DIRECTORIES else f" from {resume}"
    if record is not None:
        return f"begins run {record.run_id} again{from_there}: it has no checkpoint"
    return f"begins a new run{from_there}"


def _check_beginning(config: RunConfig, store: CheckpointStore) -> None:
    """CheckpointError where a first start could not begin by checkpoint.resume."""
    resume = config.checkpoint.resume
    if resume not in NOT_DIRECTORIES:
        found = named_at(store.where(Path(resume)))
        if not found.has_run_state or kind_of(found.directory) != "train":
            refuse_other_reference(config, found)
