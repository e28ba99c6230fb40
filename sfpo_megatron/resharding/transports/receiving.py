"""What every receiving end does, whatever brings the bytes: check, begin, load, finish.

One object in each engine worker (tensor-parallel rank). Engines take part through vLLM's
weight-transfer API, so TP splits, fused projections and online quantization are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.families.weight_names import mtp_prefixes
from sfpo_megatron.resharding.checksums import check
from sfpo_megatron.resharding.transports.replaying import Replay
from sfpo_megatron.resharding.transports.tensor_names import (
    check_manifest,
    read_checkpoint_shapes,
)


class Receiver(WeightTransferEngine):
    """Base of the engines' side of our transports."""

    _manifest: tuple[TensorMeta, ...] = ()
    _num_received: int = 0
    _replay: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]
    interruption: str | None = None
    """Why the last update's tensors did not all arrive, if this engine is not at fault."""

    def take_manifest(
        self, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        """Refuse a manifest that is not this engine's checkpoint."""
        manifest = tuple(
            TensorMeta(name=n, dtype=getattr(torch, d), shape=tuple(s))
            for n, d, s in zip(names, dtype_names, shapes, strict=True)
        )
        config = self.model_config.hf_config
        num_mtp = getattr(config, "num_nextn_predict_layers", None) or 0
        check_manifest(
            manifest,
            read_checkpoint_shapes(Path(self.model_config.model)),
            dtype=self.model_config.dtype,
            tied_embeddings=config.tie_word_embeddings or self.head_is_embedding(),
            left_out=mtp_prefixes(config.num_hidden_layers, num_mtp),
        )
        self._manifest = manifest
        self._replay = Replay(self.model)

    def head_is_embedding(self) -> bool:
        """Whether vLLM has tied the head again: it calls a model untied whose files repeat the
        embedding as its head, and compares the two when they are loaded."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if not self.model_config.word_embeddings_untied_by_checkpoint:
            return False
        modules = self._embeddings()
        own = {m.weight.data_ptr() for m in modules if not isinstance(m, ParallelLMHead)}
        heads = [m for m in self.model.modules() if isinstance(m, ParallelLMHead)]
        return all(head in modules and head.weight.data_ptr() in own for head in heads)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if not self._manifest:
            raise RuntimeError("start_weight_update before init_weight_transfer_engine")
        self._num_received, self.interruption = 0, None
        self.forget_expert_kernels()
        initialize_layerwise_reload(self.model)
        self.load_embeddings_in_place()

    def load_embeddings_in_place(self) -> None:
        """Take the vocabulary's tensors out of the layerwise reload, which would load each into
        memory of its own and copy it from there: the largest tensor of most models once more."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            _place_kernel_tensors,
            get_layerwise_info,
        )

        for module in self._embeddings():
            info = get_layerwise_info(module)
            _place_kernel_tensors(module, info)
            info.reset()

    def _embeddings(self) -> list[torch.nn.Module]:
        """Embeddings and heads that are kept as they are loaded, but for CPU's packed copies."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        return [
            module
            for module in self.model.modules()
            if isinstance(module, VocabParallelEmbedding)
            and type(module.quant_method) is UnquantizedEmbeddingMethod
        ]

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

    def load(self, tensors: Iterable[tuple[str, Tensor]], checksums: Sequence[int] | None) -> None:
        """Give vLLM full tensors, in any order; each one's checksum is compared first, if told.
        Memory that is written again may not be given: the layerwise reload keeps tensors until
        their layer is complete."""
        expected = iter(checksums or ())

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                if checksums is not None:
                    check(name, tensor, next(expected))
                self._num_received += 1
                yield name, tensor

        self.model.load_weights(self._replay(counted()))

    def finish_weight_update(self) -> None:
        """End the update, also one that was interrupted between two buckets: what vLLM has half
        loaded would be counted towards the layer at the next one, which would then take itself for
        complete too early, silently. Finished, every layer is in order, whatever its values."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._num_received != len(self._manifest) and self.interruption is None:
            raise RuntimeError(
                f"finish after {self._num_received} of {len(self._manifest)} tensors; the engine's "
                "weights are a mixture and it must be restarted"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self.pack_heads()

    def pack_heads(self) -> None:
        """Give each lm_head the new weights in their packed form (CPU only).

        On CPU, vLLM keeps a packed copy of every GEMM weight in `layer.cpu_linear`. It makes one of
        embed_tokens too, for which nothing asks beside a head: that copy is dropped, as the head's
        old one is before the new one is made.
        """
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        embeddings = self._embeddings()
        heads = [module for module in embeddings if isinstance(module, ParallelLMHead)]
        for module in embeddings:
            module.cpu_linear = None
        for head in heads or embeddings:  # without one of its own, an embedding is the head
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class WorkerReports:
    """Methods added to vLLM's worker (`worker_extension_cls`), for what cannot be told by raising.

    Where one of an engine's workers raises, vLLM leaves the answers of those after it unread and
    takes them for the answers to the next call: the engine could not be used any more.
    """

    weight_transfer_engine: Receiver

    def interrupted_update(self) -> str | None:
        """What `Receiver.interruption` says of this worker's."""
        return self.weight_transfer_engine.interruption
