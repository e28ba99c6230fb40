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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.mounts import namespace

OUTPUT_BYTES = 1 << 20
"""How much a program may print, and how large a file it may write."""
START_S = 2.0
"""Seconds for the interpreter itself, on a busy machine."""
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


@dataclass(kw_only=True, frozen=True, slots=True)
class TrialResult:
    """What came of it."""

    status: int
    output: str
    values: tuple[str | None, ...]
    """The expressions' as literals; None where there is none."""


def run_program(code: str, *, timeout_s: float, memory_bytes: int) -> Ran:
    """Run `code` as a script in a folder of its own."""
    given: dict[str, object] = {"mode": "script", "code": code}
    with new_folder() as folder, tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command(),
                input=request(given, folder, timeout_s, memory_bytes),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(folder),
                timeout=timeout_s + START_S,
            )
        except subprocess.TimeoutExpired:
            status = None
        else:
            status = signed(done.returncode)
        output.seek(0)
        return Ran(status=status, output=output.read().decode(errors="replace"))


def run_trials(
    code: str, trials: Sequence[Trial], *, timeout_s: float, memory_bytes: int
) -> list[TrialResult]:
    """Try `code` in one interpreter, each time in a fork of it; results of the first trials, as
    many as have ended within the limit."""
    asked = [asdict(trial) for trial in trials]
    given: dict[str, object] = {"mode": "trials", "code": code, "trials": asked}
    file_bytes = max([OUTPUT_BYTES, *(4 * len(trial.stdin) for trial in trials)])
    with new_folder() as folder:
        try:
            lines = subprocess.run(
                command(),
                input=request(given, folder, timeout_s, memory_bytes, file_bytes),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment(folder),
                timeout=timeout_s + START_S,
            ).stdout
        except subprocess.TimeoutExpired as error:
            lines = error.output or b""
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
    given: dict[str, object],
    folder: str,
    timeout_s: float,
    memory_bytes: int,
    file_bytes: int = OUTPUT_BYTES,
) -> bytes:
    """The first line that the interpreter reads."""
    limits: dict[str, object] = {
        "folder": folder,
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "cpu_s": timeout_s + START_S,  # reached only by several threads
        "limits_processes": isolation().limits_processes,
        "outer_mounts": namespace() if isolation().mounts else 0,
    }
    return json.dumps(given | limits).encode() + b"\n"


def environment(folder: str) -> dict[str, str]:
    """Nothing of the run's own: no token, no address."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    given = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    return {**given, **threads, "HOME": folder, "TMPDIR": folder, "PYTHONUTF8": "1"}
