"""Checkpoint directories: manifest, retention, fallback, explicit ones. No Megatron: the files are
anything. What is in them is tested in tests/dist/test_checkpoint.py.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.checkpoints.store import (
    MEGATRON_TRACKER,
    RUN_STATE,
    CheckpointError,
    CheckpointStore,
    at,
    pointed_at,
)
from sfpo_megatron.host.replacing import replacing, set_aside, write_durably


def make_store(folder: Path, **settings: object) -> CheckpointStore:
    return CheckpointStore(
        folder, **({"form": "native", "keep_last": 2, "keep_best": True} | settings)
    )


def add(store: CheckpointStore, step: int, *, best: bool = False) -> Path:
    aside = store.begin(step)
    (aside / "metadata.json").write_text("{}")
    (aside / RUN_STATE).write_text(json.dumps({"step": step}))
    (aside / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    directory = store.commit(aside, step, {})
    if best:
        store.mark_best(directory)
    store.prune()
    return directory


# ---- manifest --------------------------------------------------------------------------------


def test_manifest_of_a_whole_directory(tmp_path: Path) -> None:
    directory = add(make_store(tmp_path), 5)
    assert set(manifest.read_manifest(directory)) == {"metadata.json", RUN_STATE, "__0_0.distcp"}
    assert manifest.faults(directory) == manifest.faults(directory, drop_cache=True) == []
    # sha256 of another implementation
    line = json.loads((directory / manifest.NAME).read_text())["files"]["metadata.json"]
    assert line == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "sha256": flip,
    "bytes": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "No such file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata.json"])
def test_a_damaged_file_is_named(tmp_path: Path, message: str, name: str) -> None:
    directory = add(make_store(tmp_path), 5)
    DAMAGES[message](directory / name)
    (fault,) = manifest.faults(directory)
    assert str(directory / name) in fault and message in fault


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "files": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    directory = add(make_store(tmp_path), 5)
    (directory / manifest.NAME).write_text(content)
    (fault,) = manifest.faults(directory)
    assert str(directory / manifest.NAME) in fault


# ---- complete or absent ----------------------------------------------------------------------


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, 5)
    aside = store.begin(10)
    (aside / "__0_0.distcp").write_bytes(b"half")
    again = make_store(tmp_path)
    assert list(again.steps()) == [5]
    assert again.begin(10) == aside and not list(aside.iterdir())


def test_the_name_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that looks like a checkpoint exists before its manifest holds."""
    store = make_store(tmp_path)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target).name == "step_0000005":
            assert manifest.faults(self) == []
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    add(store, 5)
    assert (tmp_path / "latest").read_text() == "step_0000005\n"


def test_every_name_is_on_the_disk_after_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest or a pointer is flushed and synced before it gets its name, and the folder is
    synced once the checkpoint has its own. A kill of the machine is played by what was synced."""
    events: list[str] = []
    synced, renamed = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        synced(descriptor)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"sync {file.name}" + f" {file.stat().st_size}" * file.is_file())

    def note_rename(self: Path, target: Path) -> Path:
        size = f" {self.stat().st_size}" * self.is_file()
        events.append(f"{self.name}{size} -> {Path(target).name}")
        return renamed(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    store = make_store(tmp_path)
    aside = store.begin(5)
    (aside / "metadata.json").write_text("{}")
    directory = store.commit(aside, 5, {})
    size = (directory / "manifest.json").stat().st_size
    assert events == [
        f"sync manifest.json.tmp {size}",
        f"manifest.json.tmp {size} -> manifest.json",
        f"sync {aside.name}",
        f"{aside.name} -> step_0000005",
        f"sync {tmp_path.name}",
        "sync latest.tmp 13",
        "latest.tmp 13 -> latest",
    ]


def test_checkpoints_are_in_the_order_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which a file system lists them: retention and fallback go by it."""
    for step in (100, 20, 3):
        (tmp_path / f"step_{step:07d}").mkdir()
        (tmp_path / f"step_{step:07d}" / "manifest.json").touch()  # a run's own
    listed = os.listdir
    for backwards in (False, True):
        monkeypatch.setattr(
            os, "listdir", lambda path, b=backwards: sorted(listed(path), reverse=b)
        )
        assert list(make_store(tmp_path).steps()) == [3, 20, 100]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, 5)
    add(store, 5)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step_0000005"]


# ---- retention -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, False, [40]), (2, False, [30, 40]), (2, True, [10, 30, 40]), (9, True, [10, 20, 30, 40])],
)
def test_retention(tmp_path: Path, keep_last: int, keep_best: bool, kept: list[int]) -> None:
    store = make_store(tmp_path, keep_last=keep_last, keep_best=keep_best)
    for step in (10, 20, 30, 40):
        add(store, step, best=step == 10)
    assert list(store.steps()) == kept
    assert store.best == store.steps().get(10)


def test_the_old_one_stays_if_the_new_one_does_not_hold(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=1)
    add(store, 5)
    aside = store.begin(10)
    (aside / "data").write_bytes(b"x" * 100)
    flip(store.commit(aside, 10, {}) / "data")
    with pytest.raises(CheckpointError, match="step_0000010 does not hold"):
        store.prune()
    assert list(store.steps()) == [5, 10]


# ---- continuing ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_falls_back_to_the_newest_good_one(tmp_path: Path, damage: object) -> None:
    store, warnings = make_store(tmp_path, keep_last=3), []
    for step in (5, 10, 15):
        add(store, step)
    damage(tmp_path / "step_0000015/__0_0.distcp")
    (tmp_path / "step_0000010" / manifest.NAME).unlink()
    found = store.newest_good(warnings.append)
    assert found is not None and (found.step, found.has_run_state) == (5, True)
    assert "step_0000015 is broken" in warnings[0] and "__0_0.distcp" in warnings[0]
    assert "step_0000010 is broken" in warnings[1] and manifest.NAME in warnings[1]
    assert (tmp_path / "step_0000015.broken-1").is_dir()
    assert list(store.steps()) == [5]
    assert pointed_at(tmp_path) == tmp_path / "step_0000005", "for those who read it meanwhile"


def test_none_at_all_is_a_new_run_but_all_broken_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.newest_good(pytest.fail) is None
    flip(add(store, 5) / RUN_STATE)
    with pytest.raises(CheckpointError, match="--fresh"):
        store.newest_good(lambda _: None)


def test_going_back_keeps_newer_ones_but_does_not_continue_from_them(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=3)
    for step in (5, 10, 15):
        add(store, step)
    found = at(tmp_path / "step_0000005")
    assert (found.step, found.has_run_state) == (5, True)
    store.abandon_after(found.step)
    assert list(store.steps()) == [5] and (tmp_path / "step_0000015.abandoned-1").is_dir()


def test_a_copy_under_another_name_is_of_the_step_that_it_says(tmp_path: Path) -> None:
    """Or the metrics of the run that goes on from it would be set aside."""
    directory = add(make_store(tmp_path / "run"), 5)
    for name in ("the_good_one", "step_0000007"):
        found = at(directory.rename(tmp_path / name))
        directory = found.directory
        assert (directory.name, found.step, found.has_run_state) == (name, 5, True)


def test_megatron_lms_names(tmp_path: Path) -> None:
    store = make_store(tmp_path, form="megatron_lm")
    directory = add(store, 10)
    assert directory.name == "iter_0000010"
    assert (tmp_path / MEGATRON_TRACKER).read_text().strip() == "10"
    (tmp_path / "latest").unlink()
    (directory / RUN_STATE).unlink()
    (directory / manifest.NAME).unlink()
    found = at(tmp_path)  # as Megatron-LM leaves it
    assert (found.directory, found.step, found.has_run_state) == (directory, 10, False)
    (tmp_path / MEGATRON_TRACKER).write_text("release\n")
    directory.rename(tmp_path / "release")
    assert at(tmp_path).directory == tmp_path / "release"


def test_explicit_ones_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no checkpoint"):
        at(tmp_path)
    directory = add(make_store(tmp_path), 5)
    flip(directory / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="__0_0"):
        at(tmp_path)


def test_retire_keeps_an_earlier_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = make_store(folder)
    assert store.retire() is None
    add(store, 5)
    assert store.retire() == tmp_path / "checkpoints.previous-1"
    assert not folder.exists()
    add(store, 5)
    assert store.retire() == tmp_path / "checkpoints.previous-2"


def test_what_could_not_be_written_whole_is_removed(tmp_path: Path) -> None:
    """The old file stays as it is, and half a new one takes no room on a full disk."""
    file = tmp_path / "run.json"
    write_durably(file, "old")
    with pytest.raises(OSError, match="No space left"), replacing(file) as aside:
        aside.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("run.json", "old")]


def test_retention_removes_nothing_of_others(tmp_path: Path) -> None:
    """Notes in a checkpoint, a link in its place, files whose names are like our own."""
    store = make_store(tmp_path / "run", keep_last=1)
    first = add(store, 1)
    (first / "exported").mkdir()
    (first / "exported/notes.txt").write_text("mine")
    second = add(store, 2)
    assert not first.exists(), "what is ours of it goes"
    left = tmp_path / "run/step_0000001.removed-1"
    assert [p.name for p in left.rglob("*") if p.is_file()] == ["notes.txt"]
    elsewhere = second.rename(tmp_path / "archived")
    second.symlink_to(elsewhere)
    others = [tmp_path / f"run/{name}" for name in ("notes.replaced-by-me", "x.replaced-1")]
    for path in others:
        path.mkdir()
    add(store, 3)
    add(store, 4)
    assert sorted(store.steps()) == [2, 4]
    assert manifest.faults(elsewhere) == [] and all(path.is_dir() for path in others)


def test_a_kill_between_two_checkpoints_of_a_step_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is replaced has lost its name, and the new one has none yet."""
    store = make_store(tmp_path)
    first = add(store, 1)
    content = {path.name: path.read_bytes() for path in first.iterdir()}

    def kill(path: Path, target: Path) -> None:
        if path.name.startswith(".writing-"):
            raise KeyboardInterrupt
        os.rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(KeyboardInterrupt):
            add(store, 1)
    assert not first.exists()
    again = make_store(tmp_path)
    again.recover()
    found = again.newest_good(pytest.fail)
    assert found is not None and found.directory == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == content
    add(again, 1)
    again.recover()
    assert list(again.steps()) == [1], "one that has been replaced stays so"
    again.prune()
    assert not [path.name for path in tmp_path.iterdir() if "replaced" in path.name]


def test_a_replaced_checkpoint_is_abandoned_with_the_one_in_its_place(tmp_path: Path) -> None:
    """A kill came before retention had removed it."""
    store = make_store(tmp_path)
    add(store, 1)
    set_aside(add(store, 2), "replaced")
    aside = store.begin(2)
    (aside / RUN_STATE).write_text(json.dumps({"step": 2}))
    store.commit(aside, 2, {})  # and no retention
    store.abandon_after(1)
    again = make_store(tmp_path)
    again.recover()
    assert list(again.steps()) == [1]


@pytest.mark.parametrize("has_notes", [False, True])
def test_a_kill_during_retention_leaves_nothing_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_notes: bool
) -> None:
    """Half a checkpoint is none, whichever of its files went first, and goes with the next one."""
    store = make_store(tmp_path, keep_last=1)
    notes = add(store, 1) / "notes.txt"
    if has_notes:
        notes.write_text("mine")

    def kill(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    def kill_halfway(path: Path) -> None:
        (path / manifest.NAME).unlink()
        kill()

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", kill_halfway)
        if has_notes:
            patch.setattr("sfpo_megatron.checkpoints.store.set_aside", kill)
        with pytest.raises(KeyboardInterrupt):
            add(store, 2)
    assert list(make_store(tmp_path).steps()) == ([1, 2] if has_notes else [2])
    assert store.others() == []
    add(store, 3)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    kept = [name for name in left if "step_0000003" not in name]
    mine = ["step_0000001.removed-1", "step_0000001.removed-1/notes.txt"]
    assert kept == ["latest", *(mine if has_notes else [])]


def test_a_name_that_a_link_to_nothing_has_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "a.previous-1").symlink_to("none")
    (tmp_path / "a").write_text("text")
    assert set_aside(tmp_path / "a", "previous") == tmp_path / "a.previous-2"
    assert (tmp_path / "a.previous-1").is_symlink()


@pytest.mark.parametrize(("text", "name"), [("5", "iter_0000005"), ("0" * 5000, "iter_0000000")])
def test_megatrons_tracker(tmp_path: Path, text: str, name: str) -> None:
    """Python reads no number of thousands of digits."""
    (tmp_path / MEGATRON_TRACKER).write_text(f"{text}\n")
    assert pointed_at(tmp_path) == tmp_path / name
