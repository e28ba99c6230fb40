"""The tool `python`: a program in an interpreter of its own, as far from the run as can be."""

from __future__ import annotations

from sfpo_megatron.sandbox.interpreter import run_program

MAX_OUTPUT_CHARS = 20_000


def python(code: str, *, timeout_s: float = 5.0, memory_mib: int = 512) -> str:
    """Run a Python program and read what it prints.

    Args:
        code: The program. The value of a last line that is an expression is printed too.
        timeout_s: Seconds that it may take.
        memory_mib: Memory that it may take.
    """
    ran = run_program(str(code), timeout_s=timeout_s, memory_bytes=memory_mib << 20)
    if ran.status is None:
        return f"{_shown(ran.output)}[ended: it took longer than {timeout_s:g} s]"
    if ran.status < 0:
        return f"{_shown(ran.output)}[ended by signal {-ran.status}]"
    return _shown(ran.output).rstrip("\n")


def _shown(text: str) -> str:
    if len(text) > MAX_OUTPUT_CHARS:
        return f"{text[:MAX_OUTPUT_CHARS]}\n[more output is not shown]\n"
    return text if not text or text.endswith("\n") else f"{text}\n"
