"""Checkpoints on a file system that does not answer for a moment: what cannot be read does not
count as broken, and what cannot be listed not as absent.

The failures are played at os.listdir, os.scandir and Path.open.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.checkpoints.store import (
    RUN_STATE,
    CheckpointError,
    CheckpointStore,
    at,
    named_at,
)


def make_store(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder, form="native", keep_last=2, keep_best=True)
    for step in steps:
        aside = store.begin(step)
        (aside / "metadata.json").write_text("{}")
        (aside / RUN_STATE).write_text(json.dumps({"step": step}))
        (aside / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
        store.commit(aside, step, {})
    return store


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["__0_0.distcp", manifest.NAME])
def test_a_checkpoint_that_cannot_be_read_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    """A file server that is away for a moment costs no checkpoint."""
    store = make_store(tmp_path, 5, 10)
    opened, file = Path.open, tmp_path / "step_0000010" / name

    def fail(self: Path, *arguments: object, **named: object) -> object:
        if self == file:
            raise OSError(code, os.strerror(code))  # as of a read: without a name
        return opened(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        for read in (lambda: store.newest_good(pytest.fail), store.prune, lambda: at(file.parent)):
            with pytest.raises(CheckpointError) as raised:
                read()
            assert str(raised.value).startswith(f"{file}: found {os.strerror(code)}, expected")
    assert list(store.steps()) == [5, 10]
    assert store.newest_good(pytest.fail).step == 10


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A run that took it for empty would begin again at step 0, over the checkpoints."""
    store, listed = make_store(tmp_path, 5, 10), os.listdir

    def fail(path: Path) -> list[str]:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        for act in (
            store.steps,
            lambda: store.newest_good(pytest.fail),
            store.others,
            store.refuse_broken,
            store.retire,
        ):
            with pytest.raises(CheckpointError) as raised:
                act()
            assert str(raised.value).startswith(f"{tmp_path}: found {os.strerror(code)}, expected")
    assert listed(tmp_path) and list(store.steps()) == [5, 10]
    assert not make_store(tmp_path / "none").steps()


def test_a_manifest_is_of_all_files_or_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of those that could be listed would call half a checkpoint whole."""
    store = make_store(tmp_path)
    aside = store.begin(5)
    (aside / "more").mkdir()
    (aside / "metadata.json").write_text("{}")
    (aside / "more/data").write_text("x")
    scanned = os.scandir

    def fail(path: str) -> object:
        if os.path.basename(path) == "more":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return scanned(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(OSError, match="Stale file handle"):
            store.commit(aside, 5, {})
    assert not store.steps()
    assert set(manifest.read_manifest(store.commit(aside, 5, {}))) == {"metadata.json", "more/data"}


def test_a_checkpoint_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads it; `check`, which takes it by its name, does not: it may have terabytes."""
    make_store(tmp_path, 5)
    opened, weights, read = Path.open, tmp_path / "step_0000005/__0_0.distcp", []

    def count(self: Path, *arguments: object, **named: object) -> object:
        read.extend([self] if self == weights else [])
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", count)
    found = named_at(tmp_path)
    assert (found.step, read) == (5, [])
    assert (at(tmp_path), read) == (found, [weights])
