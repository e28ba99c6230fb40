"""Host buffers of snapshots and offload: writable, and not in processes that are forked.

Not exercised: page-locking, which takes CUDA (tests/gpu).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.pinning import host_buffer


def pages_here(buffer: Tensor) -> int:
    """Bytes of `buffer` that this process has mapped."""
    first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(text, 16) for text in line.split()[0].split("-"))
        found += max(0, min(stop, end) - max(start, first))
    return found


def pages_in_a_child(buffer: Tensor) -> int:
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of threads, which do nothing
        child = os.fork()
    if not child:
        os.write(writes, str(pages_here(buffer)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    answer = os.read(reads, 64)
    os.close(reads)
    os.close(writes)
    return int(answer)


def test_a_forked_child_does_not_have_the_pages() -> None:
    buffer = host_buffer(5 * 2**20 + 3)
    buffer.fill_(7)
    plain = torch.full((5 * 2**20,), 7, dtype=torch.uint8)
    assert pages_here(buffer) == buffer.nbytes == 5 * 2**20 + 3
    assert pages_in_a_child(buffer) == 0
    assert pages_in_a_child(plain) == plain.nbytes, "the test does not see what a child has"
    assert int(buffer.sum()) == 7 * buffer.nbytes


def test_its_neighbours_in_memory_are_forked() -> None:
    """Whole pages of its own: what lies beside a smaller buffer on its last page is its too."""
    assert host_buffer(3).data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
    assert host_buffer(0).nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_snapshot_is_in_such_memory(dtype: torch.dtype) -> None:
    class Shards:
        weights = torch.arange(4096, dtype=dtype)

        def tensors(self) -> Iterator[Tensor]:
            yield self.weights

        def publish(self) -> None:
            pass

        def before_step(self, callback: object) -> None:
            pass

    snapshot = HostSnapshot(Shards())
    snapshot.take()
    (copy,) = snapshot._copies.values()
    assert torch.equal(copy._host, Shards.weights)
    assert pages_in_a_child(copy._host) == 0
