"""Rule of check.py about the file of debug.save_rollouts: it is rewritten whole. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.safetensors_header import ModelFilesError, read_header

_KEY = "debug.save_rollouts"
Level = Literal["error_when_training", "error_when_writing"]
_TENSOR = re.compile(r"\d+\.[a-z_]+")  # STEP.NAME


def saved_rollouts(config: RunConfig) -> Iterator[Problem]:
    """Whether the file can be written, and replaces nothing but rollouts of an earlier start."""
    text = config.debug.save_rollouts
    if text is None:
        return
    file, read = Path(text), config.debug.train_only
    if read is not None and os.path.realpath(read) == os.path.realpath(file):
        yield _refused(f"{text!r}, which is debug.train_only", "another file than is read")
        return
    what = _in_its_place(file)
    if what is not None:
        yield _refused(what, "nothing there, or rollouts that this key has written")
        return
    folder = next(path for path in file.absolute().parents if os.path.lexists(path))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield _refused(
            f"{str(folder)!r}, where no file can be made",
            "a folder that can be written",
            "error_when_training",
        )


def _in_its_place(file: Path) -> str | None:
    """What stands at `file` and is not ours to replace."""
    if not os.path.lexists(file):
        return None
    if file.is_symlink() and not file.exists():
        return f"a link to nothing at {str(file)!r}"
    if not file.is_file():
        return f"a folder, or no regular file, at {str(file)!r}"
    try:
        names = read_header(file)
    except ModelFilesError:
        return f"a file that is no rollouts at {str(file)!r}"
    steps = {name.partition(".")[0] for name in names}
    ours = all(_TENSOR.fullmatch(name) for name in names)
    if not (names and ours and all(f"{step}.numbers" in names for step in steps)):
        return f"a safetensors file that is no rollouts at {str(file)!r}"
    return None


def _refused(found: str, expected: str, level: Level = "error_when_writing") -> Problem:
    return Problem(_KEY, found, expected, "choose another file", level)
