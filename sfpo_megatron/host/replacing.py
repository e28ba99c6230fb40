"""Files that are there whole or not at all. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Have a path beside `path` to write to, which takes its name at the end of the block. A file
    of one writer: two at a time would write to the same path. What an error or a kill leaves
    beside it the next writer begins again."""
    aside = path.with_name(f"{path.name}.tmp")
    yield aside
    aside.rename(path)


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
