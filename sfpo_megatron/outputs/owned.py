"""A directory that is written as a whole (a converter's or an export's --out, RUN/hf): whose it is.

It may be written only where it is absent, empty or an earlier output of the same tool, which a
marker file says (`MARKER`: tool, version, source, files). aside.py writes. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfpo_megatron.host.replacing import write_durably

MARKER = ".sfpo-megatron.json"
_SHOWN = 5


class NotOurs(ValueError):
    """A directory that may not be written."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Marker:
    """What `MARKER` says. `files` is None while the directory is being written."""

    tool: str
    source: str
    files: tuple[str, ...] | None

    @staticmethod
    def read(directory: Path) -> Marker | None:
        """The marker of `directory`; None if it has none that can be understood."""
        try:
            found = json.loads((directory / MARKER).read_text(encoding="utf-8"))
            files = found["files"]
            return Marker(
                tool=str(found["tool"]),
                source=str(found["source"]),
                files=None if files is None else tuple(str(name) for name in files),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, directory: Path) -> None:
        """Put it into `directory`, whole or not at all."""
        from sfpo_megatron import __version__

        content = {"tool": self.tool, "version": __version__, "source": self.source}
        write_durably(directory / MARKER, json.dumps({**content, "files": self.files}, indent=1))


def check_owned(
    out: Path,
    *,
    tool: str,
    inputs: Sequence[Path],
    overwrite: bool = False,
    adopts: Callable[[str], bool] | None = None,
) -> Path:
    """The resolved path of `out`, if `tool` may write it; else NotOurs. Nothing is changed.

    A link to a directory is written through. `adopts`: whether a file of this name is what the tool
    would write, where there is no marker yet.
    """
    real = Path(os.path.realpath(out))
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if os.path.exists(out) else "a link to nothing"
        raise NotOurs(f"{out}: found {what}, expected a directory or nothing; choose another")
    if real.exists() and (
        _overlap(real, Path.cwd()) in ("is", "contains") or os.path.ismount(real)
    ):
        raise NotOurs(
            f"{out}: found the working directory, one above it or a mount point, expected a "
            "directory that can be replaced as a whole; choose one below it"
        )
    for source in inputs:
        if how := _overlap(real, source) or _links_into(source, real):
            raise NotOurs(
                f"{out}: found that it {how} the input {source}, expected a place apart from what "
                "is read; choose another"
            )
    _check_writable(out, real)
    if real.is_dir():
        _check_contents(out, real, tool, overwrite, adopts)
    return real


def foreign_files(directory: Path) -> list[str]:
    """Names (relative) of what the marker does not list; everything, where there is no marker."""
    marker = Marker.read(directory)
    own = {MARKER, *(marker.files or ())} if marker else set()
    return [name for name in contents(directory) if name not in own]


def _check_contents(
    out: Path, real: Path, tool: str, overwrite: bool, adopts: Callable[[str], bool] | None
) -> None:
    foreign, marker = foreign_files(real), Marker.read(real)
    if not foreign and (marker is None or marker.tool == tool or overwrite):
        return
    if marker is None:
        if adopts is not None and all(adopts(name) for name in foreign):
            return
        raise NotOurs(
            f"{out}: found {listed(foreign)}, not written by {tool}, expected an empty directory, "
            f"none, or an earlier output (with {MARKER}); choose another, or move these away"
        )
    if overwrite:
        return
    found = listed(foreign) + " beside its files" if foreign else "its files"
    raise NotOurs(
        f"{out}: found an output of {marker.tool} with {found}, expected one of {tool} and nothing "
        "else; choose another, move them away, or replace only what was written (--overwrite)"
    )


def _check_writable(out: Path, real: Path) -> None:
    """Folders in `out` too: files in them are removed, and one that hides its files has others'."""
    everything = os.R_OK | os.W_OK | os.X_OK
    for folder in (next(path for path in real.parents if path.exists()), *_folders(real)):
        if not folder.is_dir() or not os.access(folder, everything, effective_ids=True):
            raise NotOurs(
                f"{out}: found {folder}, where this user may not read and write, expected a folder "
                "where that is allowed; choose another, or change its permissions"
            )


def _folders(directory: Path) -> Iterator[Path]:
    """It and every folder in it, readable or not; none where it is not there."""
    if directory.is_dir():
        yield directory
    for folder, names, _ in os.walk(directory):
        yield from (path for name in names if not (path := Path(folder, name)).is_symlink())


def listed(names: list[str]) -> str:
    """How many files, and the first of them, for a message."""
    more = "..." if len(names) > _SHOWN else ""
    return f"{len(names)} files ({', '.join(names[:_SHOWN])}{more})"


def contents(directory: Path) -> list[str]:
    """Every file, link and empty folder, relative to `directory`."""
    names = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            names.append(os.path.relpath(os.path.join(folder, name), directory))
        if not files and not folders and folder != str(directory):
            names.append(os.path.relpath(folder, directory))
    return sorted(names)


def _overlap(out: Path, source: Path) -> str:
    """How `out` stands to `source`, by what the paths lead to and not by how they are spelled."""
    if not source.exists():
        return ""
    real = Path(os.path.realpath(source))
    if out.exists() and any(os.path.samefile(out, path) for path in (real, *real.parents)):
        return "is" if os.path.samefile(out, real) else "contains"
    above = (path for path in out.parents if path.exists())
    return "lies in" if any(os.path.samefile(path, real) for path in above) else ""


def _links_into(source: Path, out: Path) -> str:
    """Whether a file of `source` is a link to one in `out`."""
    if not source.is_dir() or not out.exists():
        return ""
    for name in contents(source):
        link = source / name
        if link.is_symlink() and _overlap(out, link) in ("is", "contains"):
            return "has files of"
    return ""


def overlaps(out: Path, source: Path) -> str:
    """How `out` stands to `source`: is, contains, lies in; empty if the two are apart."""
    return _overlap(Path(os.path.realpath(out)), source)
