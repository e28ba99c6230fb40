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

What is only compared with must not fill the device: plain copies are of 2**29 parameters at most,
and count as often as these fit the shard. The reference's way (two more copies of the shard) and
`host` are left out where there is no room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.clock import Clock, keep_freed_memory
from benchmarks.overhead.weights import SIZES, PlainShards, reference_way
from sfpo_megatron.host.shortage import free_memory
from sfpo_megatron.sfpo import SlowSnapshot
from sfpo_megatron.snapshots.host import HostSnapshot

ALPHA = 0.8
COPY_BYTES, SNAPSHOT_BYTES, REPOSITION_BYTES = 8, 8, 12
"""A parameter: read and written."""
MAX_RATIO_TO_FLOOR, MIN_SPEEDUP = {"cpu": 1.3, "cuda": 1.15}, 2.5
LARGEST_COPY = 2**29
"""Parameters: far more than caches hold."""
_SPARE_BYTES = 2 * 2**30


@torch.no_grad()
def measure(size: str, device: torch.device, budget_s: float) -> dict[str, Any]:
    """One row. In a process of its own: it changes malloc."""
    shards = PlainShards(SIZES[size], device)
    snapshot = SlowSnapshot(shards)
    num_copied = min(shards.num_params, LARGEST_COPY)
    source, target = (torch.zeros(num_copied, device=device) for _ in range(2))
    arms: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "snapshot": snapshot.take,
        "reposition": lambda: snapshot.reposition(ALPHA),
        "one_tensor_lerp": lambda: torch.lerp(source, target, ALPHA, out=target),
    }
    if device.type == "cpu" or has_room(device, 8 * shards.num_params):
        arms["reference"] = lambda: reference_way(shards.tensors(), ALPHA)
    clock = Clock(device)
    plain = None
    if device.type == "cpu":
        torch.set_num_threads(1)
        alone = {"reference": arms["reference"]}
        plain = clock.compare(alone, budget_s=budget_s / 4)[0]["reference"].median_s
        keep_freed_memory()
    elif has_room(torch.device("cpu"), 4 * (shards.num_params + num_copied)):
        arms |= _host_arms(shards, target)
    times, rounds = clock.compare(arms, budget_s=budget_s)
    found = {name: t.median_s for name, t in times.items()}
    for name in found.keys() & {"copy", "one_tensor_lerp", "pcie_copy"}:
        found[name] *= shards.num_params / num_copied
    copy_s, snapshot_s, reposition_s = (found[n] for n in ("copy", "snapshot", "reposition"))
    floor_s = copy_s * (SNAPSHOT_BYTES + REPOSITION_BYTES) / COPY_BYTES
    ours_s, reference_s = snapshot_s + reposition_s, found.get("reference")
    ratio, speedup = ours_s / floor_s, reference_s and reference_s / ours_s
    missed = goals_missed(device.type, ratio, speedup)
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
        "ratio_to_one_tensor": ours_s / (copy_s + found["one_tensor_lerp"]),
        "reference_s": reference_s,
        "reference_default_malloc_s": plain,
        "speedup_over_reference": speedup,
        "host": _host_row(found, shards.num_params) if "pcie_copy" in found else None,
        "reached": not missed,
        "missed": missed,
        "quartiles_s": {name: t.quartiles_s for name, t in times.items()},
    }


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Whether that much memory is free, and some beside it."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory() or 0
    return free >= num_bytes + _SPARE_BYTES


def goals_missed(device_type: str, ratio: float, speedup: float | None) -> list[str]:
    """What a row does not reach, in words; a speedup of None was not measured."""
    most = MAX_RATIO_TO_FLOOR[device_type]
    missed = [] if ratio <= most else [f"{ratio:.2f} x floor, to reach: at most {most}"]
    if speedup is not None and speedup < MIN_SPEEDUP:
        missed.append(
            f"{speedup:.2f} x faster than the reference's way, to reach: at least {MIN_SPEEDUP}"
        )
    return missed


def _host_arms(shards: PlainShards, target: Tensor) -> dict[str, Callable[[], object]]:
    snapshot = HostSnapshot(shards)
    pinned = torch.zeros(target.numel(), pin_memory=True)
    return {
        "host_snapshot": snapshot.take,
        "host_reposition": lambda: snapshot.reposition(ALPHA),
        "pcie_copy": lambda: target.copy_(pinned, non_blocking=True),
    }


def _host_row(found: Mapping[str, float], num_params: int) -> dict[str, float]:
    names = ("host_snapshot", "host_reposition", "pcie_copy")
    snapshot_s, reposition_s, copy_s = (found[name] for name in names)
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
    compared = "not measured | "
    if row["reference_s"] is not None:
        compared = f"{1e3 * row['reference_s']:.2f} | {row['speedup_over_reference']:.1f}"
    return (
        f"| {row['num_params']:,} | {row['num_tensors']} | {row['copy_gb_per_s']:.1f} "
        f"| {1e3 * row['ours_s']:.2f} | {1e3 * row['floor_s']:.2f} | {row['ratio_to_floor']:.2f} "
        f"| {row['ratio_to_one_tensor']:.2f} | {compared} "
        f"| {'yes' if row['reached'] else 'NO: ' + '; '.join(row['missed'])} |"
        + (
            f"\nsnapshot: host exposes {1e3 * host['exposed_snapshot_s']:.2f} + "
            f"{1e3 * host['exposed_reposition_s']:.2f} ms, {host['ratio_to_pcie']:.2f} x one copy "
            f"of the shard at {host['pcie_gb_per_s']:.1f} GB/s"
            if (host := row["host"])
            else ""
        )
    )
