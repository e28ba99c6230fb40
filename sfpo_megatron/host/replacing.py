"""Files that are replaced whole or not at all, or set aside. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Have a path beside `path` to write to, which takes its name at the end of the block. A file
    of one writer: two at a time would write to the same path. An error removes what was written,
    which a full disk may need; what a kill leaves there the next writer begins again."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
        aside.rename(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def write_durably(path: Path, text: str) -> None:
    """Replace `path` in one step; the content reaches the disk before the name does."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path, why: str, *, keeps_suffix: bool = False) -> Path:
    """Rename to the first free `NAME.why-N`, or `STEM.why-N.SUFFIX`; the new path."""
    stem, suffix = (path.stem, path.suffix) if keeps_suffix else (path.name, "")
    number = 1
    # A link to nothing has the name too: renaming over it would remove it.
    while os.path.lexists(target := path.with_name(f"{stem}.{why}-{number}{suffix}")):
        number += 1
    path.rename(target)
    return target
