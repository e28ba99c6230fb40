"""What this process is doing, for the message of whatever ends it. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfpo_megatron.host.spans import Detail, span


class Phase(str):
    """A note on the exception that has left a phase: `during NAME`, as a traceback ends with it."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The phase alone."""
        return self.removeprefix("during ")


class _Record:
    """A file that says what this process is doing to whoever survives it."""

    descriptor: int | None = None


_WIDTH = 64
_record = _Record()
_open_phases: list[str] = []


def record_phases(file: Path) -> None:
    """Write each phase into `file` from now on: a process that the kernel kills says no more. A
    file that cannot be written is done without."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _record.descriptor = os.open(file, flags, 0o644)
        _write()


def recorded_phase(file: Path) -> str | None:
    """The phase in which the process that wrote `file` ended."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


@contextmanager
def doing(name: str, **details: Detail) -> Iterator[None]:
    """Name what happens inside, which is a span too; an exception that leaves it carries the
    innermost name."""
    _open_phases.append(name)
    _write()
    try:
        with span(name, **details):
            yield
    except Exception as error:
        if phase_of(error) is None:
            error.add_note(Phase(f"during {name}"))
        raise
    finally:
        _open_phases.pop()
        _write()


def phase_of(error: BaseException) -> str | None:
    """The innermost phase that `error`, or what caused it, has left."""
    seen: BaseException | None = error
    while seen is not None:
        for note in getattr(seen, "__notes__", ()):
            if isinstance(note, Phase):
                return note.name
        seen = seen.__cause__
    return None


def _write() -> None:
    if _record.descriptor is None:
        return
    name = _open_phases[-1] if _open_phases else ""
    try:
        os.pwrite(_record.descriptor, name.encode()[:_WIDTH].ljust(_WIDTH), 0)
    except OSError:  # a full disk, a file system that has gone: no reason to end a run
        with suppress(OSError):
            os.close(_record.descriptor)
        _record.descriptor = None
