"""Seconds of a call on a device, arms in turn, caches cold."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_EVICT_BYTES = 256 * 2**20
"""More than the caches of the CPUs and GPUs that we know. Between a snapshot and its reposition
lie whole passes: neither finds its operands cached."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(kw_only=True, frozen=True, slots=True)
class Times:
    """Times of one arm, in seconds."""

    median_s: float
    quartiles_s: tuple[float, float]


class Clock:
    """CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._evict = torch.zeros(_EVICT_BYTES // 4, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        self._evict.add_(1.0)
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1e3

    def compare(
        self, arms: Mapping[str, Callable[[], object]], *, budget_s: float
    ) -> tuple[dict[str, Times], int]:
        """Times of each arm and the number of rounds: as many as fit `budget_s`, 7 to 101. Every
        round runs every arm once and starts with another one."""
        names = list(arms)
        found: dict[str, list[float]] = {name: [] for name in names}
        for name in names:  # pages are touched, kernels are loaded
            arms[name]()
        start, rounds = time.perf_counter(), 0
        while rounds < 7 or (rounds < 101 and time.perf_counter() - start < budget_s):
            for index in range(len(names)):
                name = names[(index + rounds) % len(names)]
                found[name].append(self.seconds(arms[name]))
            rounds += 1
        return {name: _times(values) for name, values in found.items()}, rounds


def _times(values: list[float]) -> Times:
    low, middle, high = statistics.quantiles(values, n=4)
    return Times(median_s=middle, quartiles_s=(low, high))


def keep_freed_memory() -> None:
    """glibc's malloc no longer gives memory back to the kernel, as CUDA's caching allocator does
    not: an arm that allocates faults in no new pages, which would be most of its time."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(_M_MMAP_MAX, 0) == 1
    assert libc.mallopt(_M_TRIM_THRESHOLD, -1) == 1
