"""output_dir where a run cannot write, found without writing.

Not exercised: a real read-only mount and another user's folder (root, whom these tests may run as,
may write anywhere): `os.access` and `os.statvfs` answer for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made.configs import run_config

from sfpo_megatron.config.rules.files import outputs
from sfpo_megatron.config.rules.model import Problem


def problems(folder: Path) -> list[Problem]:
    return list(outputs(replace(run_config(), output_dir=str(folder))))


@pytest.fixture
def not_writable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a folder one where nothing can be written, as the system would say it."""

    def make(folder: Path, *, read_only: bool = False) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != folder)
        if read_only:
            flags = SimpleNamespace(f_flag=os.ST_RDONLY)
            monkeypatch.setattr(os, "statvfs", lambda path: flags)

    return make


def test_a_folder_that_is_not_there_yet_is_fine(tmp_path: Path) -> None:
    assert problems(tmp_path / "a b" / "c") == []
    assert not (tmp_path / "a b").exists()


def test_a_file_or_a_link_to_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for name, what in (("file", "a file at"), ("link", "a link to nothing at")):
        for output in (tmp_path / name, tmp_path / name / "run"):
            (problem,) = problems(output)
            assert (problem.key, problem.level) == ("output_dir", "error")
            assert problem.found == f"{what} {str(tmp_path / name)!r}"


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_of_the_run(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path) == []
    (tmp_path / name).touch()
    (problem,) = problems(tmp_path)
    assert problem.found == f"{str(tmp_path / name)!r}, which is no folder"


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", ".lock"]
)
def test_a_file_of_the_run_that_is_none_or_anothers(
    tmp_path: Path, not_writable: Callable[..., None], name: str
) -> None:
    (tmp_path / name).mkdir()
    (problem,) = problems(tmp_path)
    assert problem.found == f"{str(tmp_path / name)!r}, which is no file"
    (tmp_path / name).rmdir()
    (tmp_path / name).touch()
    assert problems(tmp_path) == []
    not_writable(tmp_path / name)
    (problem,) = problems(tmp_path)
    assert problem.found == f"{str(tmp_path / name)!r}, where this user may not write"
    assert problem.level == "error_when_training"


@pytest.mark.parametrize("inside", ["", "run", "run/deeper"])
@pytest.mark.parametrize("read_only", [False, True])
def test_the_nearest_folder_that_is_there_must_take_files(
    tmp_path: Path, not_writable: Callable[..., None], inside: str, read_only: bool
) -> None:
    not_writable(tmp_path, read_only=read_only)
    (problem,) = problems(tmp_path / inside)
    assert problem.level == "error_when_training", "check runs on other machines too"
    assert problem.found == f"{str(tmp_path)!r}, " + (
        "on a read-only file system" if read_only else "where this user may not write"
    )


def test_logs_and_checkpoints_of_an_earlier_run(
    tmp_path: Path, not_writable: Callable[..., None]
) -> None:
    """Another user's run, say, in a folder that all may write to."""
    (tmp_path / "checkpoints").mkdir()
    not_writable(tmp_path / "checkpoints")
    (problem,) = problems(tmp_path)
    assert problem.found.startswith(repr(str(tmp_path / "checkpoints")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permissions_as_the_system_has_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert len(problems(tmp_path / "run")) == 1
    finally:
        tmp_path.chmod(0o700)
