"""A fresh Python interpreter for one program, behind what `isolation.py` found.

The process limits itself (`program.py`) before it reads the program: memory, CPU seconds, size of
files, processes; it sees the interpreter's own files and its folder, where the kernel has Landlock,
and can change nothing but its folder, where it may have mounts of its own.
What it prints comes by descriptors, never by names in its folder: a program can put a link there,
and the reader is not limited.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.mounts import namespace
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.types import Json

OUTPUT_BYTES = 1 << 20
"""How much a program may print, and how large a file it may write."""
START_S = 60.0
"""Seconds until a program begins, where hundreds are started at once. They are not the program's,
whose time is counted from there."""
_CPU_START_S = 2.0
_LAST_CHARS = 500  # of what a failed start has printed
_POLL_S, _LAST_S = 0.1, 0.5
_LONGEST_S = 1e6  # at a time: `communicate` takes no more than fits the kernel's milliseconds
_BOOTSTRAP = Path(__file__).with_name("program.py")


@dataclass(kw_only=True, frozen=True, slots=True)
class Ran:
    """What became of a program."""

    status: int | None
    """Exit status, below 0 for a signal; None: it took too long, and has been ended."""
    output: str
    """What it printed."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Trial:
    """One run of a program: as a script, or for the values of expressions."""

    stdin: str = ""
    expressions: tuple[str, ...] = ()
    before: str = ""
    """Code that runs before the program whose expressions are evaluated."""
    setup: str = ""
    """Code that runs between the two."""
    modules: tuple[str, ...] = ()
    """Names of modules that the program finds imported."""
    imports: tuple[str, ...] = ()
    """More that are loaded before a program's time counts."""


@dataclass(kw_only=True, frozen=True, slots=True)
class TrialResult:
    """What came of it."""

    status: int
    output: str
    values: tuple[str | None, ...]
    """The expressions' as literals; None where there is none."""


def run_program(code: str, *, timeout_s: float, memory_bytes: int) -> Ran:
    """Run `code` as a script in a folder of its own; DidNotStart."""
    given: dict[str, Json] = {"mode": "script", "code": code}
    with new_folder() as folder, tempfile.TemporaryFile() as output:
        try:
            with _Begun() as begun:
                asked = request(begun.told(given), folder, timeout_s, memory_bytes)
                status, _ = begun.ended(asked, folder, timeout_s, output, subprocess.STDOUT)
        except DidNotStart as error:
            raise DidNotStart(f"{error}; it printed: {_printed(output)[-_LAST_CHARS:]}") from error
        return Ran(status=status, output=_printed(output))


def run_trials(
    code: str,
    trials: Sequence[Trial],
    *,
    timeout_s: float,
    memory_bytes: int,
    output_bytes: int = OUTPUT_BYTES,
) -> list[TrialResult]:
    """Try `code` in one interpreter, each time in a fork of it; results of the first trials, as
    many as have ended within the limit. DidNotStart also where it could not go on to the next."""
    all_trials: list[Json] = [asdict(trial) for trial in trials]
    imports: list[Json] = [*sorted({x for one in trials for x in (*one.modules, *one.imports)})]
    given: dict[str, Json] = {"mode": "trials", "code": code, "trials": all_trials}
    given["imports"] = imports
    file_bytes = max([output_bytes, *(4 * len(trial.stdin) for trial in trials)])
    with new_folder() as folder, _Begun() as begun:
        asked = request(begun.told(given), folder, timeout_s, memory_bytes, file_bytes)
        status, lines = begun.ended(asked, folder, timeout_s, subprocess.PIPE, subprocess.DEVNULL)
    if status:  # no program's: they run in forks of it
        raise DidNotStart(f"an interpreter ended with {status} between two trials")
    results = []
    for line in lines.splitlines()[: len(trials)]:
        try:
            found = json.loads(line)
            result = TrialResult(
                status=found["status"], output=found["output"], values=tuple(found["values"])
            )
        except (ValueError, TypeError, KeyError):  # cut off in the middle
            break
        results.append(result)
    return results


def _printed(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


class _Begun:
    """A pipe by which an interpreter says when its program begins, before the program can."""

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def told(self, given: Mapping[str, Json]) -> dict[str, Json]:
        """What the interpreter is asked for, and to say it."""
        return {**given, "begun": self._writer}

    def ended(
        self, asked: bytes, folder: str, timeout_s: float, stdout: int | IO[bytes], stderr: int
    ) -> tuple[int | None, bytes]:
        """Exit status of an interpreter, None if its program took too long and has been ended, and
        what it wrote to a pipe; DidNotStart."""
        with open(os.memfd_create("request"), "w+b") as stdin:  # whole, whatever a pipe holds
            stdin.write(asked)
            stdin.seek(0)
            process = subprocess.Popen(
                command(),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=environment(folder),
                pass_fds=(self._writer,),
            )
        with process:
            try:
                return self._waited(process, timeout_s)
            finally:
                process.kill()

    def _waited(
        self, process: subprocess.Popen[bytes], timeout_s: float
    ) -> tuple[int | None, bytes]:
        begun, end = None, time.monotonic() + START_S
        while (left := end - time.monotonic()) > 0:
            try:
                wait = min(left, _POLL_S if begun is None else _LONGEST_S)
                output, _ = process.communicate(timeout=wait)
                return self._of_program(process.returncode, output, begun)
            except subprocess.TimeoutExpired:
                if begun is None and (begun := self._time()) is not None:
                    end = begun + timeout_s
        # It may have ended before this process was scheduled again.
        status = process.poll()
        process.kill()
        try:
            output, _ = process.communicate(timeout=_LAST_S)
        except subprocess.TimeoutExpired as error:
            output = error.output
        if status is not None:
            return self._of_program(status, output, begun)
        if begun is None:
            raise DidNotStart(f"an interpreter did not start within {START_S:g} s")
        return None, output or b""

    def _of_program(
        self, status: int, output: bytes | None, begun: float | None
    ) -> tuple[int, bytes]:
        """Exit status and output of the interpreter if they are its program's; DidNotStart."""
        if begun is None and self._time() is None:
            raise DidNotStart(f"an interpreter ended with {status} before its program began")
        return signed(status), output or b""

    def _time(self) -> float | None:
        try:
            return float(os.read(self._reader, 64).partition(b"\n")[0])
        except BlockingIOError:
            return None


def signed(returncode: int) -> int:
    """An exit status below 0 for a signal; `unshare` says of one what a shell does."""
    return 128 - returncode if 128 < returncode <= 128 + signal.SIGRTMAX else returncode


def new_folder() -> tempfile.TemporaryDirectory[str]:
    """An empty folder; what a program leaves in it may resist."""
    return tempfile.TemporaryDirectory(prefix="python-", ignore_cleanup_errors=True)


def command() -> list[str]:
    """What starts the interpreter."""
    return [*isolation().command, sys.executable, "-I", str(_BOOTSTRAP)]


def request(
    given: dict[str, Json],
    folder: str,
    timeout_s: float,
    memory_bytes: int,
    file_bytes: int = OUTPUT_BYTES,
) -> bytes:
    """The first line that the interpreter reads."""
    limits: dict[str, Json] = {
        "folder": folder,
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "cpu_s": timeout_s + _CPU_START_S,  # reached only by several threads
        "limits_processes": isolation().limits_processes,
        "outer_mounts": namespace() if isolation().mounts else 0,
    }
    return json.dumps(given | limits).encode() + b"\n"


def environment(folder: str) -> dict[str, str]:
    """Nothing of the run's own: no token, no address."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    given = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    return {**given, **threads, "HOME": folder, "TMPDIR": folder, "PYTHONUTF8": "1"}
