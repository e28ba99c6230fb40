"""What is in a folder, where an empty answer has consequences. Standard library only.

`Path.glob` and `os.walk` take a folder that cannot be listed, as on a file server that is away for
a moment, for an empty one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def paths_in(folder: Path, *, begin: str = "") -> list[Path]:
    """The paths in a folder whose names begin so, in the order of their names; none where there is
    no such folder. OSError where it cannot be listed."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if name.startswith(begin)]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and in those below it. OSError where one cannot be listed."""
    for path, _, names in os.walk(folder, onerror=_raise):
        yield from (file for name in names if (file := Path(path, name)).is_file())


def _raise(error: OSError) -> None:
    raise error
