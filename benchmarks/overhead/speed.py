"""(a) Snapshot and reposition against the time their bytes need, and against the reference's way.

Bytes that must move, for each fp32 parameter: the snapshot reads 4 and writes 4; the reposition
reads 8 (slow and fast) and writes 4. The bandwidth is that of a plain copy of the same size (reads
4, writes 4), timed in the same rounds. A CPU's copy also fetches each line that it is about to
write, which is not counted, and the reposition, which has read the line, does not: its ratio can be
below 1. So the same two operations on ONE tensor are timed too: what is beyond them is ours.

The reference's way allocates. `reference_s` is its best case, memory that its last call has freed
(on a GPU the caching allocator sees to that); on CPU, `reference_default_malloc_s` is with glibc as
it comes, which returns large blocks to the kernel and faults them in again.

On a GPU `sfpo.snapshot: host` is timed too: what its snapshot and its reposition hold up on the
current stream, against a plain copy of the shard from page-locked memory (the PCIe bandwidth).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.clock import Clock, keep_freed_memory
from benchmarks.overhead.weights import SIZES, PlainShards, reference_way
from sfpo_megatron.sfpo import SlowSnapshot
from sfpo_megatron.snapshots.host import HostSnapshot

ALPHA = 0.8
COPY_BYTES, SNAPSHOT_BYTES, REPOSITION_BYTES = 8, 8, 12
"""A parameter: read and written."""
MAX_RATIO_TO_FLOOR, MIN_SPEEDUP = 1.3, 2.5


@torch.no_grad()
def measure(size: str, device: torch.device, budget_s: float) -> dict[str, Any]:
    """One row. In a process of its own: it changes malloc."""
    shards = PlainShards(SIZES[size], device)
    snapshot = SlowSnapshot(shards)
    source, target = (torch.zeros(shards.num_params, device=device) for _ in range(2))
    arms = {
        "copy": lambda: target.copy_(source),
        "snapshot": snapshot.take,
        "reposition": lambda: snapshot.reposition(ALPHA),
        "one_tensor_lerp": lambda: torch.lerp(source, target, ALPHA, out=target),
        "reference": lambda: reference_way(shards.tensors(), ALPHA),
    }
    clock = Clock(device)
    plain = None
    if device.type == "cpu":
        torch.set_num_threads(1)
        alone = {"reference": arms["reference"]}
        plain = clock.compare(alone, budget_s=budget_s / 4)[0]["reference"].median_s
        keep_freed_memory()
    elif device.type == "cuda":
        arms |= _host_arms(shards, target)
    times, rounds = clock.compare(arms, budget_s=budget_s)
    copy_s, snapshot_s, reposition_s, lerp_s, reference_s, *host_s = (
        t.median_s for t in times.values()
    )
    floor_s = copy_s * (SNAPSHOT_BYTES + REPOSITION_BYTES) / COPY_BYTES
    ours_s = snapshot_s + reposition_s
    ratio, speedup = ours_s / floor_s, reference_s / ours_s
    return {
        "size": size,
        "num_params": shards.num_params,
        "num_tensors": len(shards.tensors()),
        "rounds": rounds,
        "copy_gb_per_s": COPY_BYTES * shards.num_params / copy_s / 1e9,
        "floor_s": floor_s,
        "ours_s": ours_s,
        "ratio_to_floor": ratio,
        "snapshot_ratio": snapshot_s / (copy_s * SNAPSHOT_BYTES / COPY_BYTES),
        "reposition_ratio": reposition_s / (copy_s * REPOSITION_BYTES / COPY_BYTES),
        "ratio_to_one_tensor": ours_s / (copy_s + lerp_s),
        "reference_s": reference_s,
        "reference_default_malloc_s": plain,
        "speedup_over_reference": speedup,
        "host": _host_row(host_s, shards.num_params) if host_s else None,
        "reached": ratio <= MAX_RATIO_TO_FLOOR and speedup >= MIN_SPEEDUP,
        "quartiles_s": {name: t.quartiles_s for name, t in times.items()},
    }


def _host_arms(shards: PlainShards, target: Tensor) -> dict[str, Callable[[], object]]:
    snapshot = HostSnapshot(shards)
    pinned = torch.zeros(shards.num_params, pin_memory=True)
    return {
        "host_snapshot": snapshot.take,
        "host_reposition": lambda: snapshot.reposition(ALPHA),
        "pcie_copy": lambda: target.copy_(pinned, non_blocking=True),
    }


def _host_row(seconds: list[float], num_params: int) -> dict[str, float]:
    snapshot_s, reposition_s, copy_s = seconds
    return {
        "exposed_snapshot_s": snapshot_s,
        "exposed_reposition_s": reposition_s,
        "pcie_copy_s": copy_s,
        "pcie_gb_per_s": 4 * num_params / copy_s / 1e9,
        "ratio_to_pcie": (snapshot_s + reposition_s) / copy_s,
    }


HEADER = (
    "| params | tensors | copy GB/s | ours ms | floor ms | x floor | x one tensor "
    "| reference ms | faster | reached |\n" + "|---" * 10 + "|"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"| {row['num_params']:,} | {row['num_tensors']} | {row['copy_gb_per_s']:.1f} "
        f"| {1e3 * row['ours_s']:.2f} | {1e3 * row['floor_s']:.2f} | {row['ratio_to_floor']:.2f} "
        f"| {row['ratio_to_one_tensor']:.2f} | {1e3 * row['reference_s']:.2f} "
        f"| {row['speedup_over_reference']:.1f} | {'yes' if row['reached'] else 'NO'} |"
        + (
            f"\nsnapshot: host exposes {1e3 * host['exposed_snapshot_s']:.2f} + "
            f"{1e3 * host['exposed_reposition_s']:.2f} ms, {host['ratio_to_pcie']:.2f} x one copy "
            f"of the shard at {host['pcie_gb_per_s']:.1f} GB/s"
            if (host := row["host"])
            else ""
        )
    )
