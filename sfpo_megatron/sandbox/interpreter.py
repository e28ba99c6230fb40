"""A fresh Python interpreter for one program, behind what `isolation.py` found.

The process limits itself (`program.py`) before it reads the program: memory, CPU seconds, size of
files; it sees the interpreter's own files and its folder, where the kernel has Landlock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sfpo_megatron.sandbox.isolation import isolation

OUTPUT = ".output"
"""File in the program's folder that has what it printed."""
OUTPUT_BYTES = 1 << 20
"""How much a program may print, and how large a file it may write."""
_START_S = 2.0  # for the interpreter itself, on a busy machine
_BOOTSTRAP = Path(__file__).with_name("program.py")


def run_program(code: str, folder: str, *, timeout_s: float, memory_bytes: int) -> int:
    """Run `code` in `folder` and return its exit status, below 0 for a signal; subprocess's
    TimeoutExpired past the limit, when it has been ended."""
    limits = {
        "memory_bytes": memory_bytes,
        "file_bytes": OUTPUT_BYTES,
        "cpu_s": timeout_s + _START_S,  # reached only by several threads
        "folder": folder,
        "code": code,
    }
    command = [*isolation().command, sys.executable, "-I", str(_BOOTSTRAP)]
    with open(os.path.join(folder, OUTPUT), "wb") as output:
        done = subprocess.run(
            command,
            input=json.dumps(limits).encode(),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_environment(folder),
            timeout=timeout_s + _START_S,
        )
    # `unshare` says of a signal what a shell does.
    return 128 - done.returncode if done.returncode > 128 else done.returncode


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the run's own: no token, no address."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    given = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    return {**given, **threads, "HOME": folder, "TMPDIR": folder, "PYTHONUTF8": "1"}
