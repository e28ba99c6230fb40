"""`sfpo_shm`: weights go through a shared buffer, bucket after bucket; both sides of it.

    trainer                                       every engine worker
    -------                                       -------------------
    declare names, dtypes, shapes, the file  ->   check them against the checkpoint; map the file
    unlink the file: the maps stay
    start                                    ->   begin vLLM's layerwise reload
    for each bucket: fill half of the buffer,
                     update                  ->   checksums, if told; load; copy what waits
    finish                                   ->   all arrived? re-pack; done

While engines load from one half, the trainer fills the other, and tells them of it before they
have answered: they go on from one to the next.

The wire carries names and numbers only, nothing is unpickled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from sfpo_megatron.resharding.seams import UpdateClient, WireInfo
from sfpo_megatron.resharding.shm_update import Lockstep
from sfpo_megatron.resharding.transports import shared_file
from sfpo_megatron.resharding.transports.receiving import Receiver
from sfpo_megatron.resharding.transports.tensor_names import declaration


@dataclass(kw_only=True)
class ShmInitInfo(WeightTransferInitInfo):
    """What an engine worker is told once."""

    path: str
    buffer_bytes: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass(kw_only=True)
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """What an engine worker is told of each bucket."""

    first: int
    """Index of the bucket's first tensor in the names it was told."""
    offsets: list[int]
    """Start of each tensor of the bucket in the buffer, in bytes."""
    checksums: list[int] | None = None
    """Checksums on the trainer's shards (signed 64 bits), where they are to be compared."""


class ShmEngine(Receiver):
    """The receiving end, one in each engine worker (tensor-parallel rank)."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    _buffer: shared_file.SharedBuffer | None = None
    _loading: Sequence[Any] = ()
    """What vLLM knows of each layer's reload."""

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Refuse a manifest that is not this engine's checkpoint, then map the buffer."""
        self.take_manifest(init_info.names, init_info.dtype_names, init_info.shapes)
        self._buffer = shared_file.SharedBuffer(Path(init_info.path), init_info.buffer_bytes)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        super().start_weight_update()
        self._loading = [get_layerwise_info(layer) for layer in self.model.modules()]

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if update_info.first != self._num_received:
            raise RuntimeError(
                f"a bucket starts at tensor {update_info.first}, expected {self._num_received}"
            )
        self.load(self._tensors(update_info), update_info.checksums)
        self.keep_waiting()

    def _tensors(self, update_info: ShmUpdateInfo) -> Iterator[tuple[str, Tensor]]:
        assert self._buffer is not None
        for index, offset in enumerate(update_info.offsets, update_info.first):
            meta = self._manifest[index]
            raw = self._buffer.bytes[offset : offset + meta.num_bytes]
            yield meta.name, raw.view(meta.dtype).view(meta.shape)

    def keep_waiting(self) -> None:
        """Copy out of the buffer what belongs to layers that are not complete.

        The layerwise reload keeps what it is given until then; a q_proj that waits for the k_proj
        of the next bucket must not change when this half of the buffer is filled again.
        """
        assert self._buffer is not None
        buffer = self._buffer.bytes.untyped_storage().data_ptr()
        for info in self._loading:
            for _, call in info.loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == buffer:
                        call.arguments[name] = value.clone()

    def shutdown(self) -> None:
        self._buffer = None


@dataclass(kw_only=True)
class ShmTrainerInitInfo(TrainerInitInfo):
    """How the sending end is set up."""

    backend: ClassVar[str] = "sfpo_shm"
    fallback_dir: str
    """Directory for the buffer if shared memory has no room for it."""


class ShmTrainer(TrainerWeightTransferEngine[ShmTrainerInitInfo]):
    """The sending end, on trainer rank 0."""

    init_info_cls = ShmTrainerInitInfo

    def __init__(self, *, client: UpdateClient, filler: Lockstep, fallback_dir: Path) -> None:
        super().__init__(client=client, source=filler, is_sender=True)
        self.lost = False
        self._begin_bucket = client.begin_bucket
        self._filler = filler
        self._buffer: shared_file.SharedBuffer | None = None
        self._introduce(fallback_dir)

    @classmethod
    def trainer_init(
        cls,
        init_info: ShmTrainerInitInfo,
        *,
        client: UpdateClient,
        source: Lockstep | None = None,
    ) -> Self:
        if source is None:
            raise ValueError("sfpo_shm sends whole models: trainer_init needs a source")
        return cls(client=client, filler=source, fallback_dir=Path(init_info.fallback_dir))

    def _introduce(self, fallback_dir: Path) -> None:
        num_bytes, manifest = self._filler.buffer_bytes, self._filler.manifest
        path = shared_file.create(num_bytes, fallback_dir)
        try:
            self._buffer = shared_file.SharedBuffer(path, num_bytes)
            self._filler.attach((str(path), num_bytes))
            self.client.init_weight_transfer_engine(
                {
                    "path": str(path),
                    "buffer_bytes": num_bytes,
                    **declaration(manifest),
                }
            )
        finally:
            # Everyone has it mapped, or nobody will: whatever kills us now leaves no file behind.
            path.unlink()

    def send_weights(self, weight_version: str | None = None) -> int:
        """Send one refit; the number of bytes sent. Every rank fills buckets (collective)."""
        assert self._buffer is not None, "it has been shut down"
        self.client.start_weight_update()
        self._filler.begin()
        loading: deque[Callable[[], None]] = deque()
        for bucket in self._filler.buckets:
            if len(loading) == 2:
                loading.popleft()()  # then the half that this bucket goes into is free
            checksums = self._filler.fill_next(self._buffer.bytes)
            update: WireInfo = {"first": bucket.first, "offsets": list(bucket.offsets)}
            if checksums is not None:
                update["checksums"] = checksums
            loading.append(self._begin_bucket(update))
        self._filler.end()
        for wait in loading:
            wait()
        self.client.finish_weight_update(weight_version)
        return sum(meta.num_bytes for meta in self._filler.manifest)

    def shutdown(self) -> None:
        self._buffer = None
