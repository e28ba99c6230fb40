"""Which run a start is: run.json, ids in checkpoints, --fresh. Tensors are anything: that a
run goes on bit for bit is tested in tests/e2e/test_resume.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from made.configs import write_run

from sfpo_megatron import cli
from sfpo_megatron.checkpoints.identity import FORMAT, RunRecord, outlook
from sfpo_megatron.checkpoints.store import (
    RUN_STATE,
    CheckpointError,
    CheckpointStore,
    store_of,
)
from sfpo_megatron.config.checkpoint import CheckpointConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.continuing import Start, decide


class Run:
    """A run in a directory, started as the command would start it."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory.of(path)

    def config(self, resume: str, *, rollout_only: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            output_dir=str(self.directory.path),
            checkpoint=CheckpointConfig(resume=resume),
            debug=SimpleNamespace(rollout_only=rollout_only),
            objective=SimpleNamespace(kl=SimpleNamespace(coef=0.0)),
        )

    @property
    def store(self) -> CheckpointStore:
        return store_of(self.config("auto"))

    def start(self, resume: str = "auto", *, fresh: bool = False) -> Start:
        """Start; where `check` says beforehand that it is refused, it is, in the same words."""
        try:
            self.outlook(resume, fresh=fresh)
        except CheckpointError as error:
            with pytest.raises(CheckpointError) as caught:
                decide(self.config(resume), self.store, fresh=fresh)
            assert str(caught.value) == str(error)
            raise
        return decide(self.config(resume), self.store, fresh=fresh)

    def outlook(self, resume: str = "auto", *, fresh: bool = False) -> str:
        return outlook(self.config(resume), self.store, fresh=fresh)

    def save(self, step: int, run_id: str | None) -> Path:
        aside = self.store.begin(step)
        (aside / "metadata.json").write_text("{}")
        state = {"step": step} | ({"format": FORMAT, "run_id": run_id} if run_id else {})
        (aside / RUN_STATE).write_text(json.dumps(state))
        return self.store.commit(aside, step, {})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return Run(tmp_path / "run")


def test_never_is_for_the_first_start(run: Run) -> None:
    run.save(7, None)  # of an earlier run: set aside, once
    first = run.start("never")
    assert first.found is None and "begins" in first.said
    assert (run.directory.path / "checkpoints.previous-1/step_0000007").is_dir()
    run.save(2, first.run_id)
    assert run.outlook("never") == f"continues run {first.run_id} after step 2"
    for _ in range(2):  # every requeue
        again = run.start("never")
        assert again.found is not None and (again.found.step, again.run_id) == (2, first.run_id)
        assert "continues after step 2" in again.said and "first start" in again.said
    assert not (run.directory.path / "checkpoints.previous-2").exists()


@pytest.mark.parametrize("inside", [True, False])
def test_a_directory_is_for_the_first_start(run: Run, tmp_path: Path, inside: bool) -> None:
    other = run if inside else Run(tmp_path / "other")
    origin = other.save(2, None)
    other.save(5, None)
    first = run.start(str(origin))
    assert first.found is not None and first.found.step == 2
    run.save(9, first.run_id)
    for path in origin.iterdir():  # retention may have removed it
        path.unlink()
    origin.rmdir()
    again = run.start(str(origin))
    assert again.found is not None and (again.found.step, again.run_id) == (9, first.run_id)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_ended_before_the_first_checkpoint(run: Run, resume: str) -> None:
    first = run.start(resume)
    assert run.outlook(resume) == f"begins run {first.run_id} again: it has no checkpoint"
    again = run.start(resume)
    assert (again.found, again.run_id) == (None, first.run_id)


def test_the_format_before_is_adopted(run: Run) -> None:
    run.save(4, None)
    first = run.start()
    assert first.found is not None and first.found.step == 4
    record = RunRecord.read(run.directory)
    assert record is not None and record.adopted
    assert run.start("never").found == first.found  # begun: whatever `resume` says
    run.save(8, first.run_id)
    assert run.start().found.step == 8  # type: ignore[union-attr]


def test_the_id_comes_from_the_checkpoint_where_run_json_is_gone(run: Run) -> None:
    first = run.start()
    run.save(3, first.run_id)
    run.directory.record.unlink()
    assert run.start().run_id == first.run_id
    record = RunRecord.read(run.directory)
    assert record is not None and (record.run_id, record.adopted) == (first.run_id, False)


@pytest.mark.parametrize("foreign", ["another", None])
def test_a_checkpoint_of_another_run_is_refused(run: Run, foreign: str | None) -> None:
    first = run.start()
    run.save(3, first.run_id)
    copied = run.save(6, foreign)
    with pytest.raises(CheckpointError, match=rf"step_0000006.*{first.run_id}.*--fresh"):
        run.outlook()
    for resume in ("auto", "never", str(copied)):
        with pytest.raises(CheckpointError, match=rf"step_0000006.*{first.run_id}.*--fresh"):
            run.start(resume)
    assert run.start(str(copied), fresh=True).found.step == 6  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found something else"),
        ("[]", "found something else"),
        ('{"format": 2}', "found something else"),
        ('{"format": 2, "run_id": 3, "started": "", "adopted": false}', "found something else"),
        ('{"format": 99}', "found format 99"),
    ],
)
def test_a_record_that_cannot_be_used(run: Run, text: str, said: str) -> None:
    run.save(3, "abc")
    run.directory.record.write_text(text)
    with pytest.raises(CheckpointError, match=rf"run\.json: {said}.*--fresh"):
        run.start()
    assert run.start(fresh=True).found is None
    assert (run.directory.path / "run.json.previous-1").read_text() == text


def test_the_way_out_of_a_broken_record_keeps_the_run(run: Run) -> None:
    """Without run.json, `never` would be taken for a first start."""
    first = run.start("never")
    run.save(3, first.run_id)
    run.directory.record.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"remove the file and start once with ch.*resume=auto"
    ):
        run.start("never")
    run.directory.record.unlink()
    for resume in ("auto", "never"):
        again = run.start(resume)
        assert again.found is not None and (again.found.step, again.run_id) == (3, first.run_id)


def test_a_checkpoint_of_a_later_version_is_refused(run: Run) -> None:
    aside = run.store.begin(3)
    (aside / RUN_STATE).write_text(json.dumps({"format": FORMAT + 1, "run_id": "abc"}))
    run.store.commit(aside, 3, {})
    with pytest.raises(CheckpointError, match=f"found format {FORMAT + 1}"):
        run.start()


def test_fresh_sets_aside_and_deletes_nothing(run: Run) -> None:
    first = run.start()
    run.save(3, first.run_id)
    run.directory.metrics.write_text("{}\n")
    assert run.outlook(fresh=True).startswith("--fresh sets aside")
    second = run.start(fresh=True)
    assert second.found is None and second.run_id != first.run_id
    kept = run.directory.path
    assert (kept / "checkpoints.previous-1/step_0000003" / RUN_STATE).is_file()
    assert (kept / "metrics.previous-1.jsonl").read_text() == "{}\n"
    assert json.loads((kept / "run.json.previous-1").read_text())["run_id"] == first.run_id
    run.save(1, second.run_id)
    assert run.start().run_id == second.run_id


def test_fresh_keeps_the_policy_that_the_new_run_would_replace(run: Run) -> None:
    """A run without checkpoints has nothing else."""
    run.start()
    run.directory.hf.mkdir()
    (run.directory.hf / "model.safetensors").write_text("trained")
    for number in (1, 2):
        run.start(fresh=True)
        assert not run.directory.hf.exists() or not any(run.directory.hf.iterdir())
        kept = run.directory.path / "hf.previous-1/model.safetensors"
        assert kept.read_text() == "trained"
        run.directory.hf.mkdir(exist_ok=True)  # empty: nothing to keep
        assert not (run.directory.path / f"hf.previous-{number + 1}").exists()


def test_fresh_from_an_older_checkpoint_of_its_own(run: Run) -> None:
    first = run.start()
    older = run.save(2, first.run_id)
    run.save(5, first.run_id)
    second = run.start(str(older), fresh=True)
    assert second.found is not None and second.found.directory.is_dir()
    assert second.found.step == 2 and second.run_id != first.run_id


@pytest.mark.parametrize("fresh", [True, False], ids=["typed again", "restarted"])
@pytest.mark.parametrize("name", ["step_0000002", ""], ids=["one", "the newest in the folder"])
def test_a_run_that_went_back_begins_again_by_the_same_path(
    run: Run, fresh: bool, name: str
) -> None:
    """It was killed before its first checkpoint, while it wrote that, and what it began from has
    moved along with the run that it set aside."""
    first = run.start()
    run.save(2, first.run_id)
    there = str(run.store.folder / name)
    second = run.start(there, fresh=True)
    run.store.begin(4)
    assert not run.outlook(there, fresh=fresh).startswith("is refused")
    again = run.start(there, fresh=fresh)
    assert again.found == second.found
    assert (again.run_id == second.run_id) is not fresh


def test_a_path_that_leads_nowhere_is_looked_for_where_it_has_moved_alone(run: Run) -> None:
    first = run.start()
    run.save(2, first.run_id)
    run.start(fresh=True)
    for path in (run.store.folder / "step_0000003", run.directory.path / "step_0000002"):
        with pytest.raises(CheckpointError, match="found no checkpoint"):
            run.start(str(path), fresh=True)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_with_fresh_continues(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run.start(fresh=True)
    run.save(3, first.run_id)
    monkeypatch.setenv(name, "1")
    again = run.start(fresh=True)
    assert again.run_id == first.run_id and again.found is not None
    assert f"{name}=1" in capsys.readouterr().err


def test_all_broken_is_refused_at_every_start(run: Run) -> None:
    first = run.start()
    (run.save(3, first.run_id) / RUN_STATE).write_text("cut sho")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all broken.*--fresh"):
            run.start()
    assert run.start(fresh=True).found is None


def test_rollouts_alone_leave_the_run_as_it_is(run: Run) -> None:
    first = run.start()
    run.save(3, first.run_id)
    start = decide(run.config("never", rollout_only=True), run.store, fresh=False)
    assert start.found is None and run.start().found is not None


def test_a_checkpoint_by_others_is_neither_renamed_nor_removed(run: Run) -> None:
    """Such as Megatron-LM's, put where a run's are: not broken, and not the run's to retain."""
    theirs = run.store.folder / "iter_0000001"
    theirs.mkdir(parents=True)
    (theirs / "metadata.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"iter_0000001: .*no run has written.*resume"):
            run.start()
    begun = run.start(fresh=True)
    for step in (2, 3, 4, 5):
        run.save(step, begun.run_id)
    run.store.prune()
    assert run.start().said.endswith("continues after step 5")
    assert (theirs / "metadata.json").is_file() and min(run.store.steps()) > 2


def test_a_record_reads_back(run: Run) -> None:
    record = RunRecord.new()
    record.write(run.directory)
    assert RunRecord.read(run.directory) == record
    assert set(json.loads(run.directory.record.read_text())) == set(dataclasses.asdict(record))


def test_no_job_carries_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["slurm", "none.yaml", "--nodes=1", "--time=1:00:00", "--fresh", "--dry-run"]
    assert cli.main(arguments) == 2
    assert "--fresh: found it for a job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", []),
        ("sft", []),
        ("train", ["--fresh"]),
        ("sft", ["--fresh"]),
        ("train", ["--accept-data-change"]),
        ("train", ["--fresh", "--accept-data-change"]),
    ],
)
def test_the_launcher_hands_its_options_to_every_rank(
    command: str,
    options: list[str],
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    model_dir()
    write_run(parallel={"data": 1})
    monkeypatch.setattr(
        "sfpo_megatron.launcher.launch.launch", lambda arguments, **_: given.append(arguments) or 0
    )
    assert cli.main([command, "run.yaml", *options]) == 0
    assert [text for text in given[0] if text in ("--fresh", "--accept-data-change")] == options
    ranks: list[dict[str, bool]] = []
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(
        "sfpo_megatron.launcher.rank.run_rank", lambda run, **_: ranks.append(run.keywords) or 0
    )
    assert cli.main(given[0]) == 0
    fresh, accept = "--fresh" in options, "--accept-data-change" in options
    assert ranks == [{"fresh": fresh, "accept_data_change": accept}]
