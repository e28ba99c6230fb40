"""A directory that the project writes as a whole: a converter's or an export's --out, RUN/hf.

It is written only where it is absent, empty or an earlier output of the same tool, which a marker
file says (`MARKER`: tool, version, source, files). It is written aside and put in place by one
rename. What others have put there is never removed: it is an error, or with `overwrite` it is kept.

    .NAME.sfpo-lock           beside it while it is written: one writer at a time
    .NAME.sfpo-new-PID-xxxx   the new one, until it is put in place; then what is left of the old
    .NAME.sfpo-old-PID-xxxx   the old one, on file systems that cannot exchange two names

Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import filecmp
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sfpo_megatron.host.replacing import write_durably

MARKER = ".sfpo-megatron.json"
_SHOWN = 5
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

log = logging.getLogger(__name__)


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
    return [name for name in _contents(directory) if name not in own]


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
            f"{out}: found {_listed(foreign)}, not written by {tool}, expected an empty directory, "
            f"none, or an earlier output (with {MARKER}); choose another, or move these away"
        )
    if overwrite:
        return
    found = _listed(foreign) + " beside its files" if foreign else "its files"
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


def _listed(names: list[str]) -> str:
    more = "..." if len(names) > _SHOWN else ""
    return f"{len(names)} files ({', '.join(names[:_SHOWN])}{more})"


def _contents(directory: Path) -> list[str]:
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
    for name in _contents(source):
        link = source / name
        if link.is_symlink() and _overlap(out, link) in ("is", "contains"):
            return "has files of"
    return ""


def overlaps(out: Path, source: Path) -> str:
    """How `out` stands to `source`: is, contains, lies in; empty if the two are apart."""
    return _overlap(Path(os.path.realpath(out)), source)


@contextmanager
def writing(
    out: Path,
    *,
    tool: str,
    inputs: Sequence[Path],
    overwrite: bool = False,
    adopts: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """An empty directory that becomes `out` at the end of the block, if nothing is raised.

    NotOurs comes before the block. At every moment `out` is the old one or the new one; where two
    names cannot be exchanged, the next writer puts the old one back after a kill in between.
    """
    real = check_owned(out, tool=tool, inputs=inputs, overwrite=overwrite, adopts=adopts)
    real.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(out, real):
        _tidy(real)
        # Again, now that no other writer can change it.
        check_owned(out, tool=tool, inputs=inputs, overwrite=overwrite, adopts=adopts)
        aside = Path(tempfile.mkdtemp(prefix=_prefix(real, "new"), dir=real.parent))
        try:
            source = ", ".join(str(path) for path in inputs)
            marker = Marker(tool=tool, source=source, files=None)
            marker.write(aside)
            yield aside
            files = tuple(name for name in _contents(aside) if name != MARKER)
            _keep_foreign(out, real, aside, files, adopts)
            Marker(tool=tool, source=source, files=files).write(aside)
            aside.chmod(real.stat().st_mode & 0o7777 if real.exists() else 0o777 & ~_umask())
            old = _put_in_place(aside, real)
        except BaseException:
            _remove_tree(aside)
            raise
        if old is not None:
            _remove_own(old, real)


def _prefix(out: Path, which: str) -> str:
    return f".{out.name}.sfpo-{which}-{os.getpid()}-"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _keep_foreign(
    out: Path, real: Path, aside: Path, files: tuple[str, ...], adopts: Callable[[str], bool] | None
) -> None:
    """Link what others have put into `real` into `aside` too."""
    if not real.is_dir():
        return
    foreign = foreign_files(real)
    if foreign and Marker.read(real) is None:
        if adopts is None or not all(adopts(name) for name in foreign):
            raise NotOurs(f"{out}: found {_listed(foreign)}, which came meanwhile; move them away")
        Marker(tool="adopted", source="", files=tuple(foreign)).write(real)
        return
    for name in foreign:
        if os.path.lexists(aside / name) or any((aside / p).is_file() for p in Path(name).parents):
            raise NotOurs(
                f"{out}: found {name}, which was not written by this tool and would be replaced, "
                "expected no such file; move it away"
            )
        _link(real / name, aside / name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _put_in_place(aside: Path, out: Path) -> Path | None:
    """`aside` becomes `out`; returns where the old one is now, if there was one."""
    if not out.exists() or not any(out.iterdir()):
        os.rename(aside, out)  # over an empty directory too, in one motion
        return None
    if _exchange(aside, out):
        return aside
    old = Path(tempfile.mkdtemp(prefix=_prefix(out, "old"), dir=out.parent))
    os.rename(out, old)
    try:
        os.rename(aside, out)
    except BaseException:
        os.rename(old, out)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one motion; False where that cannot be done."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _remove_own(old: Path, out: Path) -> None:
    """Remove `old` but for what is neither ours nor in `out`: that stays, and is said."""
    marker = Marker.read(old)
    if marker is None:  # killed before its marker was there, or after it was removed
        files = [name for name in _contents(old) if not (old / name).is_dir()]
        if all(name.startswith(f"{MARKER}.") for name in files):
            _remove_tree(old)
        return
    if marker.files is None:  # never finished: all in it is ours, or linked from `out`
        _remove_tree(old)
        return
    own = set(marker.files)
    for name in _contents(old):
        if name != MARKER and (name in own or _is_same(old / name, out / name)):
            _remove(old / name)
    left = [name for name in _contents(old) if name != MARKER and not (old / name).is_dir()]
    if left:
        log.warning("%s: left in place, found %s that came meanwhile", old, _listed(left))
        return
    _remove_tree(old)


def _remove_tree(folder: Path) -> None:
    """The marker last, so that a kill in between leaves what the next writer knows as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARKER:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def _is_same(one: Path, other: Path) -> bool:
    if not os.path.lexists(other):
        return False
    if os.path.samestat(os.lstat(one), os.lstat(other)):
        return True
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _tidy(out: Path) -> None:
    """After a writer that was killed: put the old directory back if there is none, and remove what
    it had made. The lock is held, so no writer of `out` lives."""
    start = f".{out.name}.sfpo-"
    beside = sorted(path for path in out.parent.iterdir() if path.name.startswith(start))
    for path in beside:
        if path.name.startswith(f"{start}old-") and not out.exists() and Marker.read(path):
            os.rename(path, out)
        elif path.name.startswith((f"{start}old-", f"{start}new-")) and path.is_dir():
            _remove_own(path, out)


@contextmanager
def one_writer(out: Path, real: Path) -> Iterator[None]:
    """One writer of `real` at a time, else NotOurs; the lock file beside it goes with the last.
    `out`: the path as it was given, for the message."""
    path = real.with_name(f".{real.name}.sfpo-lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise NotOurs(
                f"{out}: found another process that is writing it, expected one at a time; wait "
                "for its end, or choose another"
            ) from None
        except OSError as error:
            log.warning("%s: no flock on this file system (%s)", path, error.strerror)
            break
        try:  # its last holder may have removed what we opened
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        os.close(descriptor)
