"""How buckets of an update are filled: by every rank with its pieces, or by rank 0 from a stream.

A filler is driven in lockstep on all trainer ranks, bucket after bucket; each method says what it
communicates. No vllm here: ranks other than the sender never import it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.checksums import checksum, signed
from sfpo_megatron.resharding.seams import ShardedSource, WeightSource
from sfpo_megatron.resharding.transports import shared_file
from sfpo_megatron.resharding.transports.tensor_names import Bucket, ManifestError


class Filler(Protocol):
    """Fills buckets, on every rank. On the sender the transport calls it, elsewhere the driver."""

    @property
    def manifest(self) -> Sequence[TensorMeta]:
        """Every tensor that will be sent, in order."""

    def attach(self, file: tuple[str, int] | None) -> None:
        """Take part in a new buffer: on the sender its (path, bytes), None elsewhere (on the sender
        too where it failed: then nobody writes). Collective."""

    def begin(self, *, verify: bool) -> None:
        """Begin an update. Collective."""

    def fill(self, bucket: Bucket, buffer: Tensor | None) -> list[int] | None:
        """Put all tensors of `bucket` at their offsets in `buffer` (uint8; None elsewhere than on
        the sender, and there where it failed); their checksums, where they are wanted and this is
        the sender. Collective."""

    def end(self) -> None:
        """End the update, after the last bucket. Collective."""


def views(manifest: Sequence[TensorMeta], bucket: Bucket, buffer: Tensor) -> Iterator[Tensor]:
    """Yield the tensors of a bucket as they lie in the buffer."""
    for index, offset in enumerate(bucket.offsets, bucket.first):
        meta = manifest[index]
        yield buffer[offset : offset + meta.num_bytes].view(meta.dtype).view(meta.shape)


class StreamFiller:
    """Rank 0 copies what it gets by iterating a source, on which every rank takes part."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._stream: Iterator[tuple[str, Tensor]] = iter(())
        self._verify = False
        # Here, where every rank comes by: a source may have to communicate to know it.
        self.manifest = manifest_of(source)

    def attach(self, file: tuple[str, int] | None) -> None:
        pass

    def begin(self, *, verify: bool) -> None:
        self._stream, self._verify = iter(self._source), verify

    def fill(self, bucket: Bucket, buffer: Tensor | None) -> list[int] | None:
        if buffer is None:
            for _ in bucket.offsets:
                next(self._stream, None)
            return None
        checksums = []
        targets = views(self.manifest, bucket, buffer)
        for index, target in enumerate(targets, bucket.first):
            tensor = self._next(self.manifest[index])
            with torch.no_grad():
                target.copy_(tensor)
            if self._verify:
                checksums.append(signed(checksum(tensor)))
        return checksums if self._verify else None

    def _next(self, meta: TensorMeta) -> Tensor:
        name, tensor = next(self._stream, (None, None))
        if name is None or tensor is None:
            raise ManifestError(f"{meta.name}: in the source's metadata(), but not iterated")
        found = TensorMeta(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        if found != meta:
            raise ManifestError(f"the source's metadata() says {meta}, its iteration gave {found}")
        return tensor

    def end(self) -> None:
        extra = next(self._stream, None)  # also lets a collective source finish its last exchange
        if extra is not None:
            raise ManifestError(f"{extra[0]}: iterated, but not in the source's metadata()")


class ShardFiller:
    """Every rank writes its own pieces into the buffer, which all have mapped: no gathering."""

    def __init__(self, source: ShardedSource) -> None:
        self._source = source
        self._control = source.control
        self._buffer: shared_file.SharedBuffer | None = None
        self._verify = False
        self.manifest = source.metadata()

    def attach(self, file: tuple[str, int] | None) -> None:
        file = self._control.broadcast_json(file)
        self._buffer = shared_file.SharedBuffer(Path(file[0]), file[1]) if file else None
        self._control.barrier()  # the sender unlinks it now

    def begin(self, *, verify: bool) -> None:
        self._verify = verify
        self._source.prepare()

    def fill(self, bucket: Bucket, buffer: Tensor | None) -> list[int] | None:
        self._control.barrier()  # the sender comes by when this part of the buffer is free
        partial = [0] * len(bucket.offsets)
        if self._buffer is not None:
            for number, target in enumerate(views(self.manifest, bucket, self._buffer.bytes)):
                self._source.write(bucket.first + number, target)
                if self._verify:
                    partial[number] = signed(self._source.checksum(bucket.first + number))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # for the copies that are under way
        # Its end is the end of everybody's writing.
        sums = self._control.sum(torch.tensor(partial, dtype=torch.int64)).tolist()
        return sums if self._verify and self._control.rank == 0 else None

    def end(self) -> None:
        pass


def make_filler(source: WeightSource) -> Filler:
    """`ShardFiller` for the ranks' shards where all ranks are on one host. Collective."""
    sharded = source.sharded
    if sharded is not None:
        hosts = source.control.all_gather_json(socket.gethostname())
        if len(set(hosts)) == 1:
            return ShardFiller(sharded)
    return StreamFiller(source)


def manifest_of(source: WeightSource) -> list[TensorMeta]:
    """Every tensor of a source, in order."""
    return [
        TensorMeta(name=declared.name, dtype=declared.dtype, shape=tuple(declared.shape))
        for declared in source.metadata()
    ]
