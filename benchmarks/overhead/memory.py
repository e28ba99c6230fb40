"""(c) Peak extra memory of one snapshot and reposition: measured, not computed.

On a CPU the growth of the process's peak resident memory, on a GPU that of the allocator's peak;
there the host's growth is given too. Each in a fresh process. Where the kernel does not let a
process reset its peak, the host's growth is None, and so are copies that count it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.overhead.weights import SIZES, PlainShards, reference_way
from sfpo_megatron.sfpo import SlowSnapshot, Snapshot
from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.moments import MomentSnapshot

ALPHA = 0.8
ARMS = ("device", "device, moments: restore", "host", "reference")
MAX_COPIES = {"device": 1.0, "device, moments: restore": 3.0, "host": 1.0}
"""Copies of the shard in all; `host` needs two staging buckets on top, and on a GPU holds its copy
in host memory."""
_TOLERANCE = 0.02
"""Share of the shard that pages of code and of the allocator may add."""
RESET_PEAK = Path("/proc/self/clear_refs")
"""Some sandboxes have none, or refuse it."""


class PlainAdam:
    """`AdamState` over plain tensors."""

    def __init__(self, shards: PlainShards) -> None:
        self._moments = [t.clone() for t in shards.tensors() for _ in ("exp_avg", "exp_avg_sq")]

    def moments(self) -> Sequence[Tensor]:
        return self._moments

    def step_counts(self) -> list[float]:
        return [1.0]

    def set_step_counts(self, counts: Sequence[float]) -> None:
        pass


def measure(size: str, device: torch.device, arm: str) -> dict[str, Any]:
    """One row. In a process of its own."""
    torch.set_num_threads(1)
    small = PlainShards(SIZES["1M"], device)
    _run(arm, small, PlainAdam(small))  # kernels and libraries are loaded
    shards = PlainShards(SIZES[size], device)
    adam = PlainAdam(shards) if "restore" in arm else None
    peak = _Peak(device)
    staging_bytes = _run(arm, shards, adam)
    on_device, on_host = peak.growth()
    shard_bytes = 4 * shards.num_params
    on_both = arm == "host" or device.type == "cpu"
    counted = on_host if on_both else 0
    copies = None if counted is None else (on_device - staging_bytes + counted) / shard_bytes
    missed = []
    if copies is not None and copies > MAX_COPIES.get(arm, copies) + _TOLERANCE:
        missed.append(f"{copies:.2f} copies of the shard, to reach: {MAX_COPIES[arm]:g}")
    if arm == "host" and device.type == "cuda":
        allowed = staging_bytes + _TOLERANCE * shard_bytes
        if on_device > allowed:
            missed.append(f"{on_device} bytes on the device, to reach: at most {allowed:.0f}")
    return {
        "arm": arm,
        "num_params": shards.num_params,
        "shard_bytes": shard_bytes,
        "staging_bytes": staging_bytes,
        "peak_extra_device_bytes": on_device,
        "peak_extra_host_bytes": on_host,
        "copies_beside_staging": copies,
        "reached": None if arm not in MAX_COPIES or (copies is None and not missed) else not missed,
        "missed": missed,
    }


def _run(arm: str, shards: PlainShards, adam: PlainAdam | None) -> int:
    """One snapshot and one reposition; returns the bytes of staging buckets."""
    if arm == "reference":
        reference_way(shards.tensors(), ALPHA)
        return 0
    plain = (HostSnapshot if arm == "host" else SlowSnapshot)(shards)
    snapshot: Snapshot = plain
    if adam is not None and "restore" in arm:
        snapshot = MomentSnapshot(plain, adam, mode="restore")
    snapshot.take()
    snapshot.reposition(ALPHA)
    return getattr(plain, "num_staging_bytes", 0)


class _Peak:
    """Growth of peak memory since it was made: (on the GPU, in the process's resident memory)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
        self._resident: int | None = None
        try:
            RESET_PEAK.write_text("5")  # the peak is now what is resident
        except OSError:
            return
        self._resident = _status_bytes("VmRSS")

    def growth(self) -> tuple[int, int | None]:
        """The second is None where the process's peak could not be reset."""
        resident = None if self._resident is None else _status_bytes("VmHWM") - self._resident
        if not self._cuda:
            return 0, resident
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._allocated, resident


def _status_bytes(key: str) -> int:
    for text in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if text.startswith(key):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


HEADER = (
    "| snapshot | params | shard MiB | extra device MiB | extra host MiB | staging MiB "
    "| copies of the shard | reached |\n" + "|---" * 8 + "|"
)


def line(row: dict[str, Any]) -> str:
    sizes = {key: row[key] for key in row if key.endswith("_bytes")}
    mib = {key: "?" if size is None else f"{size / 2**20:.1f}" for key, size in sizes.items()}
    copies = row["copies_beside_staging"]
    missed = f"NO: {'; '.join(row['missed'])}"
    reached = {True: "yes", False: missed, None: ""}[row["reached"]]
    return (
        f"| {row['arm']} | {row['num_params']:,} | {mib['shard_bytes']} "
        f"| {mib['peak_extra_device_bytes']} | {mib['peak_extra_host_bytes']} "
        f"| {mib['staging_bytes']} | {'?' if copies is None else f'{copies:.2f}'} | {reached} |"
    )
