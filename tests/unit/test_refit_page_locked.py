"""The refit's shared buffer is page-locked on CUDA, here with the device's calls recorded.

Not exercised: CUDA itself, and what page-locking saves.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.filling import ShardFiller
from sfpo_megatron.resharding.transports.shared_file import SharedBuffer
from sfpo_megatron.resharding.transports.tensor_names import Bucket


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA is asked for, in order."""
    made: list[str] = []

    def register(address: int, num_bytes: int, flags: int) -> int:
        made.append(f"lock {num_bytes}")
        return 0

    def unregister(address: int) -> int:
        made.append("unlock")
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    stream = SimpleNamespace(synchronize=lambda: made.append("wait"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "buffer"
    path.write_bytes(bytes(64))
    return path


class Source:
    """A `ShardedSource` of one rank, and its control; copies are noted, as if under way."""

    def __init__(self, calls: list[str]) -> None:
        self.control = self
        self.rank = 0
        self.calls = calls

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name="w", shape=(4,), dtype=torch.float32)]

    def write(self, index: int, target: Tensor) -> None:
        self.calls.append("copy")
        target.fill_(1.0)

    def broadcast_json(self, value: object) -> object:
        return value

    def barrier(self) -> None:
        pass

    def sum(self, values: Tensor) -> Tensor:
        self.calls.append("all have written")
        return values


def test_locked_as_long_as_it_is_there(calls: list[str], file: Path) -> None:
    buffer = SharedBuffer(file, 64)
    assert calls == ["lock 64"] and buffer.bytes.nbytes == 64
    del buffer
    gc.collect()
    assert calls == ["lock 64", "unlock"]


def test_a_bucket_is_whole_before_anybody_hears_of_it(calls: list[str], file: Path) -> None:
    filler = ShardFiller(Source(calls))  # type: ignore[arg-type]
    filler.attach((str(file), 64))
    filler.fill(Bucket(first=0, offsets=(0,)), None)
    assert calls == ["lock 64", "copy", "wait", "all have written"]


def test_memory_that_cannot_be_locked_is_slower_and_no_error(
    calls: list[str],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor of the kernel that comes next, as which torch would take what CUDA keeps of it."""

    def next_kernel(*size: int, device: str) -> None:
        calls.append(f"kernel on {device}")
        raise RuntimeError("CUDA error: out of memory")

    refuses = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    monkeypatch.setattr(torch, "zeros", next_kernel)
    with caplog.at_level(logging.WARNING):
        assert SharedBuffer(file, 64).bytes.nbytes == 64
    assert calls == ["kernel on cuda"]
    (record,) = caplog.records
    assert "refit will be slower: refit.transport: found shm, but 64 bytes" in record.getMessage()


def test_a_slice_is_put_in_place_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row-parallel weight's columns: torch gathers them in pageable memory first, and copies from
    there at once if it is not to wait. Rows go straight into the page-locked buffer."""
    from sfpo_megatron.resharding.source import put

    waited: list[bool] = []
    copy = Tensor.copy_

    def recorded(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        waited.append(not non_blocking)
        return copy(self, source, non_blocking)

    monkeypatch.setattr(Tensor, "copy_", recorded)
    piece, rows, columns = torch.arange(16.0).view(4, 4), torch.zeros(8, 4), torch.zeros(4, 8)
    put(piece, into=rows.narrow(0, 4, 4))
    put(piece, into=columns.narrow(1, 4, 4))
    assert waited == [False, True]
    assert torch.equal(rows[4:], piece) and torch.equal(columns[:, 4:], piece)
