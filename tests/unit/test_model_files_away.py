"""A file system that is away for a moment, as `check` meets it.

Not exercised: a real one; `Path.open` raises what such systems raise.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from made.model_files import INDEX, SHARDS, checked


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
