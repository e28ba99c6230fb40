"""vLLM's `nccl` reads a pass on CUDA streams of its own: no weight is read before it is written.

vLLM's own producer runs here over recorded streams, which know what each has put in a tensor that
nobody has waited for. Not exercised: CUDA itself; NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.source_pass import SourcePass


class Recorded:
    """The streams of a device: `unfinished` has what each has written and nobody waited for."""

    def __init__(self) -> None:
        self.unfinished: dict[str, set[int]] = {}
        self.current = "the trainer's"
        self.num_made = 0
        self.reads: list[str] = []
        self.sent: list[Tensor] = []

    def write(self, tensor: Tensor) -> None:
        self.unfinished.setdefault(self.current, set()).add(tensor.data_ptr())

    def read(self, tensor: Tensor) -> None:
        self.reads.append(self.current)
        for stream, written in self.unfinished.items():
            raced = stream != self.current and tensor.data_ptr() in written
            assert not raced, f"{self.current} reads what {stream} is still writing"

    def make(self, device: int) -> RecordedStream:
        self.num_made += 1
        return RecordedStream(self, f"side {self.num_made}")

    @contextmanager
    def on(self, stream: RecordedStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self.sent.append(tensor.clone())


class RecordedStream:
    """One stream, for which the host can wait."""

    def __init__(self, streams: Recorded, name: str) -> None:
        self._streams, self.name = streams, name

    def synchronize(self) -> None:
        self._streams.unfinished.pop(self.name, None)


class Weights:
    """Main params that an optimizer step has just changed; their gather is still due."""

    def __init__(self, streams: Recorded) -> None:
        self.streams = streams
        self.main = [torch.full((8,), float(i)) for i in range(6)]
        self.params = [torch.zeros(8) for _ in self.main]
        self.manifest = [TensorMeta(name=str(i), shape=(8,), dtype=torch.float32) for i in range(6)]
        self.is_due = True
        for tensor in self.main:
            streams.write(tensor)

    def prepare(self) -> None:
        """Gather, once."""
        if self.is_due:
            for param, main in zip(self.params, self.main, strict=True):
                self.streams.read(main)
                self.streams.write(param.copy_(main))
        self.is_due = False

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        self.prepare()
        for meta, param in zip(self.manifest, self.params, strict=True):
            self.streams.read(param)
            yield meta.name, param


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: id(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", made.make)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: RecordedStream(made, made.current))
    return made


def send(streams: Recorded, weights: Weights, *, prepared: bool = True) -> None:
    """Two tensors a chunk, over vLLM's two streams."""
    prepare = [weights.prepare] if prepared else []
    source = SourcePass(weights.manifest, weights.stream, *prepare)
    source.restart(fresh=False, verify=False)
    packed_nccl_broadcast_producer(
        iter(source), streams, 0, lambda item: item[1], buffer_size_bytes=63
    )


def test_vllm_reads_what_the_trainer_has_written(streams: Recorded) -> None:
    weights = Weights(streams)
    send(streams, weights)
    assert torch.equal(torch.cat(streams.sent).view(torch.float32), torch.cat(weights.main))
    assert {"side 1", "side 2"} <= set(streams.reads), "vLLM no longer reads on its own streams"


def test_without_the_gather_one_side_gathers_and_the_other_reads(streams: Recorded) -> None:
    with pytest.raises(AssertionError, match="side 2 reads what side 1 is still writing"):
        send(streams, Weights(streams), prepared=False)


def test_without_the_wait_the_update_is_under_way(
    streams: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedStream, "synchronize", lambda self: None)
    with pytest.raises(AssertionError, match="side 1 reads what the trainer's is still writing"):
        send(streams, Weights(streams))
