"""`sfpo_shm`: weights go through a shared buffer, bucket after bucket; both sides of it.

    trainer                                       every engine worker
    -------                                       -------------------
    declare names, dtypes, shapes, the file  ->   check them against the checkpoint; map the file
    unlink the file: the maps stay
    start                                    ->   begin vLLM's layerwise reload
    for each bucket: fill half of the buffer,
                     update                  ->   checksums, if told; copy its tensors out, load
    finish                                   ->   all arrived? re-pack; done

While engines load from one half, the trainer fills the other.

Engines take part through vLLM's weight-transfer API, so TP splits, fused projections and online
quantization are vLLM's own. The wire carries names and numbers only, nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from sfpo_megatron.resharding.checksums import check
from sfpo_megatron.resharding.lockstep import Lockstep
from sfpo_megatron.resharding.transports import shared_file
from sfpo_megatron.resharding.transports.manifest import (
    TensorMeta,
    check_manifest,
    read_checkpoint_shapes,
)


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
    """Where each tensor of the bucket starts in the buffer, in bytes."""
    checksums: list[int] | None = None
    """As on the trainer's shards (signed 64 bits), where they are to be compared."""


class ShmEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """The receiving end, one in each engine worker (tensor-parallel rank)."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    _buffer: Tensor | None = None
    _manifest: tuple[TensorMeta, ...] = ()
    _num_received: int = 0

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Refuse a manifest that is not this engine's checkpoint, then map the buffer."""
        rows = zip(init_info.names, init_info.dtype_names, init_info.shapes, strict=True)
        manifest = tuple(
            TensorMeta(name=n, dtype=getattr(torch, d), shape=tuple(s)) for n, d, s in rows
        )
        check_manifest(
            manifest,
            read_checkpoint_shapes(Path(self.model_config.model)),
            dtype=self.model_config.dtype,
            tied_embeddings=self.model_config.hf_config.tie_word_embeddings,
        )
        self._buffer = shared_file.map_bytes(Path(init_info.path), init_info.buffer_bytes)
        self._manifest = manifest

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._buffer is None:
            raise RuntimeError("start_weight_update before init_weight_transfer_engine")
        self._num_received = 0
        self.forget_expert_kernels()
        initialize_layerwise_reload(self.model)

    def forget_expert_kernels(self) -> None:
        """Have the experts' weights packed again (CPU only).

        vLLM packs them where it first builds the kernel of a mixture-of-experts layer. At a reload
        it would find that kernel, skip the packing, and read plain weights as packed, silently.
        """
        from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if update_info.first != self._num_received:
            raise RuntimeError(
                f"a bucket starts at tensor {update_info.first}, expected {self._num_received}"
            )
        if update_info.checksums is not None:
            for (name, tensor), expected in zip(
                self._tensors(update_info), update_info.checksums, strict=True
            ):
                check(name, tensor, expected)
        self.model.load_weights(self._tensors(update_info))
        self._num_received += len(update_info.offsets)

    def _tensors(self, update_info: ShmUpdateInfo) -> Iterator[tuple[str, Tensor]]:
        assert self._buffer is not None
        for index, offset in enumerate(update_info.offsets, update_info.first):
            meta = self._manifest[index]
            raw = self._buffer[offset : offset + meta.num_bytes]
            yield meta.name, self.take(raw.view(meta.dtype).view(meta.shape))

    def take(self, tensor: Tensor) -> Tensor:
        """Copy a tensor out of the buffer.

        The layerwise reload keeps what it is given until a layer is complete; a q_proj that waits
        for the k_proj of the next bucket must not change when that bucket is filled in.
        """
        return tensor.to(self.device, copy=True)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._num_received != len(self._manifest):
            raise RuntimeError(
                f"finish after {self._num_received} of {len(self._manifest)} tensors; the engine's "
                "weights are a mixture and it must be started anew"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self.repack_tied_lm_head()

    def repack_tied_lm_head(self) -> None:
        """Give a tied lm_head the new weights in its packed form (CPU only).

        On CPU, vLLM keeps a packed copy of every GEMM weight in `layer.cpu_linear`. The layerwise
        reload re-packs the first owner of a shared parameter, embed_tokens, which has no GEMM; the
        lm_head would go on with the old weights, silently.
        """
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model.modules():
            # An untied head was re-packed like any layer and its plain weight is gone (0 elements).
            if isinstance(module, ParallelLMHead) and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        self._buffer = None


@dataclass(kw_only=True)
class ShmTrainerInitInfo(TrainerInitInfo):
    """How the sending end is set up."""

    backend: ClassVar[str] = "sfpo_shm"
    fallback_dir: str
    """Where the buffer goes if shared memory has no room for it."""


class ShmTrainer(TrainerWeightTransferEngine[ShmTrainerInitInfo]):
    """The sending end, on trainer rank 0."""

    init_info_cls = ShmTrainerInitInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, filler: Lockstep, fallback_dir: Path
    ) -> None:
        super().__init__(client=client, source=filler, is_sender=True)
        self._filler = filler
        self._buffer: Tensor | None = None
        # The engines' answer to a bucket comes while the next one is filled.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update_weights")
        self._introduce(fallback_dir)

    @classmethod
    def trainer_init(
        cls,
        init_info: ShmTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: Lockstep | None = None,
    ) -> Self:
        if source is None:
            raise ValueError("sfpo_shm sends whole models: trainer_init needs a source")
        return cls(client=client, filler=source, fallback_dir=Path(init_info.fallback_dir))

    def _introduce(self, fallback_dir: Path) -> None:
        num_bytes, manifest = self._filler.buffer_bytes, self._filler.manifest
        path = shared_file.create(num_bytes, fallback_dir)
        try:
            self._buffer = shared_file.map_bytes(path, num_bytes)
            self._filler.attach((str(path), num_bytes))
            self.client.init_weight_transfer_engine(
                {
                    "path": str(path),
                    "buffer_bytes": num_bytes,
                    "names": [meta.name for meta in manifest],
                    "dtype_names": [str(m.dtype).removeprefix("torch.") for m in manifest],
                    "shapes": [list(meta.shape) for meta in manifest],
                }
            )
        finally:
            # Everyone has it mapped, or nobody will: whatever kills us now leaves no file behind.
            path.unlink()

    def send_weights(self, weight_version: str | None = None) -> int:
        """One refit; the number of bytes sent. Every rank fills buckets (collective)."""
        self.client.start_weight_update()
        self._filler.begin()
        loading: Future[None] | None = None
        for bucket in self._filler.buckets:
            checksums = self._filler.fill_next(self._buffer)
            if loading is not None:
                loading.result()  # then the other half of the buffer is free
            update = {"first": bucket.first, "offsets": list(bucket.offsets)}
            if checksums is not None:
                update["checksums"] = checksums
            loading = self._thread.submit(self.client.update_weights, update)
        self._filler.end()
        if loading is not None:
            loading.result()
        self.client.finish_weight_update(weight_version)
        return sum(meta.num_bytes for meta in self._filler.manifest)

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._buffer = None
