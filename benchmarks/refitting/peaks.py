"""The most memory that processes hold during a call, beyond what they held before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

_INTERVAL_S = 0.001


def resident_bytes(pid: int) -> int:
    """Private and shared-memory pages of a process; pages of mapped files do not count (the page
    cache takes them back). 0 for one that is gone."""
    found = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as stream:
            for line in stream:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    found += int(line.split()[1]) * 1024
    except OSError:
        pass
    return found


def extra_bytes(
    call: Callable[[], object],
    pids: Mapping[str, int],
    held: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Peaks by name, sampled every millisecond while `call` runs. `held`: by name, what counts as
    held before instead of what is now."""
    now = {name: resident_bytes(pid) for name, pid in pids.items()}
    before, peak = now | dict(held or {}), dict(now)
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            for name, pid in pids.items():
                peak[name] = max(peak[name], resident_bytes(pid))
            time.sleep(_INTERVAL_S)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return {name: peak[name] - before[name] for name in pids}
