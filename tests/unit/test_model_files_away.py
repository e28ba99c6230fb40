"""A file system that is away for a moment, as `check` meets it.

Not exercised: a real one; `Path.open` and `os.stat` raise what such systems raise.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from made.model_files import INDEX, SHARDS, checked

from sfpo_megatron import cli


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("file", ["run.yaml", "config.json", "tokenizer.json", INDEX, SHARDS[0]])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_system_that_is_away_makes_no_config_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    code: int,
) -> None:
    """Exit code 1, after which a job is requeued: it may be back by then. A file that this user may
    not read is the user's to mend."""
    really = Path.open

    def away(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == file:
            raise OSError(code, os.strerror(code), str(self))
        return really(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", away)
    found, err = checked(capsys)
    assert found == (2 if code == errno.EACCES else 1), err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert os.strerror(code) in line
    if code != errno.EACCES and file != "run.yaml":
        assert line.endswith("start again when the file system is back")


OVERRIDES = ["data.train=[{source: jsonl, path: data.jsonl}]", "reward.function=math"]
COMMANDS = {
    "check": [],
    "plan": [],
    "slurm": ["--nodes=1", "--time=4:00:00", "--env=env.sh", "--dry-run"],
}


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["run.yaml", "model", "data.jsonl", "run", "env.sh"])
@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.EACCES])
def test_what_cannot_be_looked_at_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
    code: int,
) -> None:
    """A file or a folder of which not even `stat` says anything, whichever command meets it."""
    Path("data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 64)
    Path("env.sh").touch()
    really, away = os.stat, os.path.abspath(place)

    def stat(path: Any = ".", *arguments: Any, **more: Any) -> os.stat_result:
        if not isinstance(path, int) and f"{os.path.abspath(path)}/".startswith(f"{away}/"):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return really(path, *arguments, **more)

    monkeypatch.setattr(os, "stat", stat)
    found = cli.main([command, "run.yaml", *COMMANDS[command], *OVERRIDES])
    err = capsys.readouterr().err
    if place == "env.sh" and command != "slurm":
        assert found == 0, err
        return
    assert found == (2 if code == errno.EACCES else 1), err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert os.strerror(code) in line and place in line
