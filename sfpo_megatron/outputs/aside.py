"""A directory that is written aside and put in place by one rename, so that it is always whole.

What others have put there is never removed: it is an error, or with `overwrite` it is kept.

    .NAME.sfpo-lock           beside it while it is written: one writer at a time
    .NAME.sfpo-new-PID-xxxx   the new one, until it is put in place; then what is left of the old
    .NAME.sfpo-old-PID-xxxx   the old one, on file systems that cannot exchange two names

Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import filecmp
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfpo_megatron.outputs.owned import (
    MARKER,
    Marker,
    NotOurs,
    check_owned,
    contents,
    foreign_files,
    listed,
)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

log = logging.getLogger(__name__)


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
            files = tuple(name for name in contents(aside) if name != MARKER)
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
            raise NotOurs(f"{out}: found {listed(foreign)}, which came meanwhile; move them away")
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
        files = [name for name in contents(old) if not (old / name).is_dir()]
        if all(name.startswith(f"{MARKER}.") for name in files):
            _remove_tree(old)
        return
    if marker.files is None:  # never finished: all in it is ours, or linked from `out`
        _remove_tree(old)
        return
    own = set(marker.files)
    for name in contents(old):
        if name != MARKER and (name in own or _is_same(old / name, out / name)):
            _remove(old / name)
    left = [name for name in contents(old) if name != MARKER and not (old / name).is_dir()]
    if left:
        log.warning("%s: left in place, found %s that came meanwhile", old, listed(left))
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
