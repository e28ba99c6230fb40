"""How much memory a phase of a train step needs at the most."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_RESIDENT = "5\n"
"""What resets VmHWM (proc(5), clear_refs)."""


class PeakMemory(Protocol):
    """The most memory since it was last asked."""

    def take_bytes(self) -> int:
        """The peak since the last call; begins another."""


class NoPeak:
    """Nothing can be measured here."""

    def take_bytes(self) -> int:
        """0: nothing was measured."""
        return 0


NO_PEAK = NoPeak()


class DevicePeak:
    """What torch has allocated on the current GPU."""

    def take_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)


class ResidentPeak:
    """What of this process is in memory, by Linux."""

    def take_bytes(self) -> int:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        _CLEAR.write_text(_PEAK_RESIDENT, encoding="ascii")
        return int(peak) * 1024


@cache
def peak_memory() -> PeakMemory:
    """The measure of this process: its GPU's memory, else its own."""
    if torch.cuda.is_available():
        return DevicePeak()
    try:
        ResidentPeak().take_bytes()
    except (OSError, ValueError):  # another system, or a container that forbids it
        return NO_PEAK
    return ResidentPeak()
