"""The tool `python`: a program in an interpreter of its own, as far from the run as can be."""

from __future__ import annotations

import resource

from sfpo_megatron.sandbox.interpreter import run_program
from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.tools import NotBegun, require_number

MAX_OUTPUT_CHARS = 20_000
INTERPRETERS = ("fresh", "persistent")


def warm_up(*, timeout_s: float = 5.0, memory_mib: int = 512, interpreter: str = "fresh") -> None:
    """Refuse settings before a call is made, find out what isolates programs here, and run one
    that is empty: a machine that begins none would say so to the model alone."""
    if interpreter not in INTERPRETERS:
        raise ValueError(
            f"interpreter: found {interpreter!r}, expected one of {', '.join(INTERPRETERS)}"
        )
    require_number("timeout_s", timeout_s)
    require_number("memory_mib", memory_mib, whole=True)
    isolation()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY != hard < memory_mib << 20:
        raise ValueError(
            f"memory_mib: found {memory_mib}, expected at most {hard >> 20}, to which this machine "
            "limits a process (ulimit -v); lower it, or raise the limit"
        )
    python("", timeout_s=timeout_s, memory_mib=memory_mib)


def python(
    code: str, *, timeout_s: float = 5.0, memory_mib: int = 512, interpreter: str = "fresh"
) -> str:
    """Run a Python program and read what it prints.

    Args:
        code: The program. The value of a last line that is an expression is printed too.
        timeout_s: Seconds that it may take.
        memory_mib: Memory that it may take.
        interpreter: fresh for each program; persistent is not run here (`interpreters.py`).
    """
    try:
        ran = run_program(str(code), timeout_s=timeout_s, memory_bytes=memory_mib << 20)
    except (DidNotStart, OSError) as error:
        raise NotBegun(str(error)) from error
    if ran.status is None:
        return f"{shown(ran.output)}[ended: it took longer than {timeout_s:g} s]"
    if ran.status < 0:
        return f"{shown(ran.output)}[ended by signal {-ran.status}]"
    return shown(ran.output).rstrip("\n")


def shown(text: str) -> str:
    """What of an output is told, with a line's end."""
    if len(text) > MAX_OUTPUT_CHARS:
        return f"{text[:MAX_OUTPUT_CHARS]}\n[more output is not shown]\n"
    return text if not text or text.endswith("\n") else f"{text}\n"
