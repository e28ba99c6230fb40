"""Processes that are to end: a kill has been sent before it has worked."""

from __future__ import annotations

import time

from sfpo_megatron.host.processes import is_alive


def gone(pid: int, within_s: float = 10.0) -> bool:
    """True if the process ends in time (a zombie has ended)."""
    deadline = time.monotonic() + within_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
