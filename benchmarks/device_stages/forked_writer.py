"""Stage `fork`: a checkpoint's writer reads what was staged, and has no host buffer of ours.

(a) The copies that a forked writer reads are in page-locked memory, which it shares with this
process: while it waits, this process asks torch for as much such memory as it can get, fills it
with other values, and the file must have the staged ones. (b) Processes that are forked beside a
page-locked host buffer do not have its pages; what a fork takes with and without such a buffer.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.device_stages import tiny
from sfpo_megatron.snapshots.pinning import host_buffer, pin

NUM_TENSORS, NUMEL = 64, 1 << 16
BUFFER_BYTES = {"cpu": 64 * 2**20, "cuda": 8 * 2**30}


def run(device: torch.device) -> dict[str, Any]:
    with tiny.alone(device) as folder:
        config = tiny.run_config(folder, "local", "bfloat16")
        from sfpo_megatron.mcore.setup import init_distributed, shut_down

        init_distributed(config)
        figures = staged_copies(device)
        shut_down()
    return figures | forks(device)


def staged_copies(device: torch.device) -> dict[str, Any]:
    """(a), by the class that saves checkpoints."""
    from sfpo_megatron.mcore.writing import Writing

    sources = [torch.full((NUMEL,), float(i), device=device) for i in range(NUM_TENSORS)]
    go, wait = os.pipe()

    def stage() -> list[tuple[Path, str, list[Tensor]]]:
        copies = [t.to("cpu", non_blocking=True) for t in sources]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [(file, file.name, copies)]

    def write(_: object, parts: list[tuple[Path, str, list[Tensor]]]) -> None:
        os.read(go, 1)
        file.write_bytes(b"".join(t.numpy().tobytes() for t in parts[0][2]))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "part.distcp")
        request: Any = SimpleNamespace(
            async_fn=write, async_fn_args=(None, None), preload_fn=stage, finalize_fns=[]
        )
        writing = Writing(request, Path(folder))
        pinned = [
            torch.full((NUMEL,), -1.0, pin_memory=device.type == "cuda")
            for _ in range(2 * NUM_TENSORS)
        ]
        os.write(wait, b"x")
        writing.finish()
        found = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
    del pinned
    expected = torch.cat([t.cpu() for t in sources])
    assert torch.equal(found, expected), "the writer read memory that had been given away"
    return {"staged_bytes": expected.nbytes, "backend": dist.get_backend()}


def forks(device: torch.device) -> dict[str, float]:
    """(b)"""
    bare_s, _ = fork(None)
    buffer, owner = host_buffer(BUFFER_BYTES[device.type]), SimpleNamespace
    if device.type == "cuda":
        pin(buffer, owner=owner, key="this stage", found="a GPU", instead="a CPU")
    buffer.fill_(1)
    beside_s, mapped = fork(buffer)
    assert mapped == 0, f"a forked process has {mapped} bytes of the buffer"
    return {
        "buffer_bytes": buffer.nbytes,
        "fork_s": bare_s,
        "fork_beside_buffer_s": beside_s,
    }


def fork(buffer: Tensor | None) -> tuple[float, int]:
    """Seconds until a forked process has started, and the bytes of `buffer` that it has."""
    reads, writes = os.pipe()
    begun = time.perf_counter()
    child = os.fork()
    if not child:
        os.write(writes, str(mapped_bytes(buffer) if buffer is not None else 0).encode())
        os._exit(0)
    answer = int(os.read(reads, 64))
    seconds = time.perf_counter() - begun
    os.waitpid(child, 0)
    os.close(reads)
    os.close(writes)
    return seconds, answer


def mapped_bytes(buffer: Tensor) -> int:
    first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    found = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, stop = (int(text, 16) for text in line.split()[0].split("-"))
        found += max(0, min(stop, end) - max(start, first))
    return found
