"""Stage `ipc`: a bucket goes to another process by a handle and comes back changed, not copied.

On a GPU the handle is CUDA IPC's, which refit.transport ipc sends; on a CPU it is shared memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

BYTES = {"cpu": 2**20, "cuda": 512 * 2**20}
_WAIT_S = 60.0


def run(device: torch.device) -> dict[str, Any]:
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.Queue(), context.Queue()
    bucket = torch.arange(BYTES[device.type] // 4, dtype=torch.int32, device=device)
    expected = int(bucket.sum(dtype=torch.int64))
    process = context.Process(target=receive, args=(there, back), daemon=True)
    process.start()
    begun = time.perf_counter()
    there.put(bucket)
    found = back.get(timeout=_WAIT_S)
    seconds = time.perf_counter() - begun
    assert found == expected, f"the other process read {found}, expected {expected}"
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert bool((bucket == -1).all()), "what the other process wrote is not here"
    there.put(None)
    process.join(_WAIT_S)
    assert process.exitcode == 0, f"the other process ended with {process.exitcode}"
    return {"bytes": bucket.nbytes, "first_round_trip_s": seconds}


def receive(there: Any, back: Any) -> None:
    """Sum the bucket and write -1 into all of it."""
    bucket: Tensor = there.get()
    total = int(bucket.sum(dtype=torch.int64))
    bucket.fill_(-1)
    if bucket.is_cuda:
        torch.cuda.synchronize()
    back.put(total)
    del bucket
    there.get()
