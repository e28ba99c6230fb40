"""A pass over a source's tensors that can be followed to its end from wherever a failure left it:
what vLLM's own transports are given. No vllm here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.seams import Place


class Rendezvous(Place):
    """The place where the two ends of one of vLLM's own transports meet, and how many come."""

    workers_per_engine: int
    num_ranks: int
    """Number of trainer ranks."""
    num_shards: int
    """Number of slices that a tensor-parallel group has each weight in."""


class IntroductionFailed(RuntimeError):
    """Engines did not come to the rendezvous: they were lost meanwhile."""

    @property
    def reason(self) -> str | None:
        """Why they could not be met; None where no engine was there to come."""
        return str(self) or None


class SourcePass:
    """vLLM's `WeightSource`, by structure: each iteration is a fresh pass, on every trainer rank in
    lockstep (collective)."""

    def __init__(
        self,
        manifest: Sequence[TensorMeta],
        stream: Callable[[], Iterator[tuple[str, Tensor]]],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`stream()` begins a pass: (name, tensor) in the manifest's order. `prepare()` makes the
        weights readable; collective."""
        self.manifest = list(manifest)
        self._stream, self._prepare = stream, prepare
        self._pass: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[TensorMeta]:
        """Objects with `.name .dtype .shape`: vLLM's `ParamMeta`, by structure."""
        return self.manifest

    def restart(self, *, fresh: bool, verify: bool) -> None:
        """Begin another update; the weights are whole and written when this returns. Collective.

        vLLM reads a pass on CUDA streams of its own, which wait for nothing that was put on this
        one (`packed_nccl_broadcast_producer` in vllm/distributed/weight_transfer/packed_tensor.py):
        not for Adam, the reposition, or the gather that follows them.
        """
        assert not verify, "check refuses refit.verify_every with these"
        self._pass = None
        self._prepare()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._stream()
        return self._pass

    def follow(self) -> None:
        """Go through everything that is left, with nothing sent. Collective."""
        for _ in self if self._pass is None else self._pass:
            pass


def packed_bytes(manifest: Sequence[TensorMeta], bucket_bytes: int) -> int:
    """Size of the buffer that vLLM packs into: a larger tensor would be refused (ipc)."""
    return max(bucket_bytes, *(meta.num_bytes for meta in manifest))
