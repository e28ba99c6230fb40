"""The files that a source's `path` stands for: one, those of a directory, or a glob's.

Standard library only: `check` counts rows with it.
"""

from __future__ import annotations

import glob
from pathlib import Path

ENDINGS = {"jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), "parquet": (".parquet",)}
"""Source -> what the names of its files in a directory end with."""


def files_of(source: str, path: str) -> list[Path]:
    """The files, in the order of their names; none where `path` leads to none. A file that is named
    in full is taken whatever it is called, and a name with `*` in it that is there is no glob."""
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        found = (file for file in given.iterdir() if file.name.endswith(ENDINGS[source]))
    else:
        found = (Path(name) for name in glob.iglob(path, recursive=True))
    return sorted(file for file in found if file.is_file())


def name_of(path: str) -> str:
    """What the rows of `path` are called after: its stem; of a glob, the directory's."""
    given = Path(path.removesuffix(".gz"))
    if glob.has_magic(path) and not given.exists():
        plain = [part for part in given.parts if not glob.has_magic(part)]
        return Path(*plain).name if plain and Path(*plain).name else "files"
    return given.stem
