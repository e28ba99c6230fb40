"""The tool `python`: a program in an interpreter of its own, as far from the run as can be."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from sfpo_megatron.sandbox.interpreter import OUTPUT, run_program

MAX_OUTPUT_CHARS = 20_000


def python(code: str, *, timeout_s: float = 5.0, memory_mib: int = 512) -> str:
    """Run a Python program and read what it prints.

    Args:
        code: The program. The value of a last line that is an expression is printed too.
        timeout_s: Seconds that it may take.
        memory_mib: Memory that it may take.
    """
    with tempfile.TemporaryDirectory(prefix="python-") as folder:
        try:
            status = run_program(
                str(code), folder, timeout_s=timeout_s, memory_bytes=memory_mib << 20
            )
        except subprocess.TimeoutExpired:
            return f"{_printed(folder)}[ended: it took longer than {timeout_s:g} s]"
        printed = _printed(folder)
    if status < 0:
        return f"{printed}[ended by signal {-status}]"
    return printed.rstrip("\n")


def _printed(folder: str) -> str:
    with Path(folder, OUTPUT).open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(MAX_OUTPUT_CHARS + 1)
    if len(text) > MAX_OUTPUT_CHARS:
        return f"{text[:MAX_OUTPUT_CHARS]}\n[more output is not shown]\n"
    return text if not text or text.endswith("\n") else f"{text}\n"
