"""The files of a source, each with what its rows' ids begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.config.source_files import files_of
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.errors import SourceError, shorten


def numbered_files(source: DataSource) -> Iterator[tuple[Path, str]]:
    """(file, beginning of its rows' ids): nothing for a source of one file, else its name, with as
    many of its folders as tell it from the others."""
    path = source.path or ""
    files = files_of(source.source, path)
    if not files:
        raise SourceError(
            "path",
            found=shorten(path),
            expected=f"a {source.source} file, a directory of them, or a glob that matches some",
            fix="correct the path",
        )
    if len(files) == 1 and str(files[0]) == str(Path(path)):
        yield files[0], ""
        return
    depth = 1
    while len({file.parts[-depth:] for file in files}) < len(files):
        depth += 1
    for file in files:
        yield file, "/".join(file.parts[-depth:]) + "/"
