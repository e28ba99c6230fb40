"""The folder of a run's temporary files, wherever TMPDIR points: short enough for Ray's sockets.

Not exercised: a real run below such a TMPDIR (tests/e2e/test_ends.py), file systems without
sockets.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.host import temporary
from sfpo_megatron.host.scratch import Scratch, note_segment, remove_abandoned
from sfpo_megatron.host.temporary import NoTemporaryFolder, own_folder, temporary_folder

# What Ray and vLLM bind below a run's folder, and what an actor's own processes do.
RAY = "session_2026-11-29_01-22-53_123456_1234567/sockets/plasma_store"
VLLM = "0044581e-f34b-4c48-b12e-95cbbc197206"
LISTENER = "sfpo-scoring-abcdefgh/pymp-abcdefgh/listener-abcdefgh"


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS", "VLLM_RPC_BASE_PATH", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)


def bind(folder: str, name: str) -> None:
    """Bind a socket of that path below `folder`."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(str(path))


@pytest.mark.parametrize("name", ["a", "a" * 61, "a b", "ä", "none", "file", "closed", "'a'"])
def test_sockets_fit_below_any_tmpdir(
    short: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A short one is used; all others are as if they were not there, and nothing stays."""
    asked = short / name
    if name == "file":
        asked.touch()
    elif name != "none":
        asked.mkdir(mode=0o500 if name == "closed" else 0o700)
    monkeypatch.setenv("TMPDIR", str(asked))
    for variable in ("RAY_TMPDIR", "VLLM_RPC_BASE_PATH"):  # they come before TMPDIR
        monkeypatch.setenv(variable, f"/{'r' * 90}")
    with temporary_folder() as folder:
        closed = name == "closed" and os.geteuid() != 0
        assert (Path(folder).parent == asked) == (name in ("a", "closed") and not closed)
        assert os.environ["TMPDIR"] == os.environ["RAY_TMPDIR"] == folder == tempfile.gettempdir()
        assert os.stat(folder).st_mode & 0o777 == 0o700
        bind(folder, RAY)
        actor = own_folder()
        assert Path(actor.path).parent == Path(folder) and tempfile.gettempdir() == actor.path
        assert os.environ["VLLM_RPC_BASE_PATH"] == actor.path
        Path(actor.path, VLLM).touch()
        bind(actor.path, LISTENER)
        assert len(f"{actor.path}/{VLLM}") < 108
    assert not os.path.exists(folder)
    assert (os.environ["TMPDIR"], os.environ["RAY_TMPDIR"]) == (str(asked), f"/{'r' * 90}")
    if asked.is_dir():
        assert not any(asked.iterdir())


@pytest.mark.parametrize("length", [20, 27, 28, 40, 60, 90])
def test_the_longest_tmpdir_is_told_by_a_socket(
    short: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    asked = short / ("x" * (length - len(str(short)) - 1))
    asked.mkdir()
    monkeypatch.setenv("TMPDIR", str(asked))
    with temporary_folder() as folder:
        assert (Path(folder).parent == asked) == (length <= 27)
        bind(folder, RAY)


def test_a_relative_tmpdir_is_the_same_everywhere(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short)
    (short / "here").mkdir()
    monkeypatch.setenv("TMPDIR", "here")
    with temporary_folder() as folder:
        assert Path(folder).parent == short / "here"


def test_without_any_folder_one_line_says_so(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short / "file").touch()
    monkeypatch.setattr(temporary, "_ELSEWHERE", (str(short / "none"), str(short / "file")))
    monkeypatch.setattr(tempfile, "tempdir", str(short / ("x" * 50)))
    (short / ("x" * 50)).mkdir()
    with pytest.raises(NoTemporaryFolder) as raised, temporary_folder():
        pass
    line = str(raised.value)
    assert "\n" not in line and line.startswith("TMPDIR: found no folder for sockets (")
    assert "x: AF_UNIX path too long" in line and "none: No such file or directory" in line
    assert "file: Not a directory" in line and line.endswith("set TMPDIR to such a folder")
    assert not any((short / ("x" * 50)).iterdir())


def test_a_cluster_of_others_is_looked_for_where_it_was(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray finds the address that `auto` means below RAY_TMPDIR, or else TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with temporary_folder():
        assert os.environ["RAY_TMPDIR"] == str(short)
    monkeypatch.setenv("RAY_TMPDIR", "/theirs")
    with temporary_folder():
        assert os.environ["RAY_TMPDIR"] == "/theirs"


def test_what_compilers_keep_from_run_to_run_stays(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with temporary_folder():
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == short
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_noted_shared_memory_goes_with_the_folder(short: Path) -> None:
    """And nothing that is not shared memory, nor folders of others that have such a name."""
    segment, mine = Path("/dev/shm", f"psm_test_{os.getpid()}"), short / "mine"
    segment.touch()
    mine.touch()
    outer = Scratch("sfpo-", str(short))
    note_segment(segment, Scratch("sfpo-", outer.path).path)
    note_segment(mine, outer.path)
    (short / "sfpo-models").mkdir()
    remove_abandoned("sfpo-", str(short))
    assert segment.exists(), "its owner lives"
    outer.remove()
    assert not segment.exists()
    assert sorted(path.name for path in short.iterdir()) == ["mine", "sfpo-models"]


def test_a_refit_buffer_goes_with_the_run_that_is_killed_over_it(short: Path) -> None:
    from sfpo_megatron.resharding.transports import shared_file

    with temporary_folder():
        path = shared_file.create(4096, short)
        assert path.exists() and path.parent == Path("/dev/shm")
    assert not path.exists()
    path = shared_file.create(4096, short)  # of somebody who has made no such folder
    path.unlink()
    assert not any(short.iterdir())


def test_what_is_written_while_a_folder_is_removed_goes_as_well(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes do that: they end with their cluster, but after us."""
    scratch, late = Scratch("sfpo-", str(short)), [2]
    session = Path(scratch.path, "session")
    session.mkdir()

    def one_more_file(folder: str, ignore_errors: bool) -> None:
        if late[0]:
            late[0] -= 1
            (session / "late").touch()
        else:
            rmtree(folder, ignore_errors)

    rmtree = shutil.rmtree
    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", one_more_file)
        scratch.remove()
    assert not any(short.iterdir())


def test_what_cannot_be_removed_is_left_to_the_next_run(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = Scratch("sfpo-", str(short))
    Path(scratch.path, "session").mkdir()
    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", lambda *_, **__: None)
        scratch.remove()
    assert Path(scratch.path, "session").exists()
    remove_abandoned("sfpo-", str(short))
    assert not any(short.iterdir())
