"""A line a second while tensors go by."""

from __future__ import annotations

import sys
import time


class Progress:
    """`step` once a tensor; the last one is always printed."""

    def __init__(self, total: int, *, every_s: float = 1.0) -> None:
        self._total, self._every_s = total, every_s
        self._done, self._bytes = 0, 0
        self._begun = self._shown = time.monotonic()

    def step(self, name: str, num_bytes: int) -> None:
        self._done += 1
        self._bytes += num_bytes
        now = time.monotonic()
        if self._done < self._total and now - self._shown < self._every_s:
            return
        self._shown = now
        mib, seconds = self._bytes / 2**20, max(now - self._begun, 1e-3)
        print(
            f"[{self._done}/{self._total}] {mib:,.0f} MiB, {mib / seconds:,.0f} MiB/s: {name}",
            file=sys.stderr,
            flush=True,
        )
