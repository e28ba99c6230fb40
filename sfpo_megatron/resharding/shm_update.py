"""The update of `sfpo_shm`: every rank fills each bucket, one rank hands it to the engines."""

from __future__ import annotations

from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.filling import Filler
from sfpo_megatron.resharding.stepwise import Stepwise
from sfpo_megatron.resharding.transports.tensor_names import Bucket, plan_buckets


class Lockstep(Stepwise[tuple[str, int]]):
    """A filler with its buckets, attached to a buffer (path, bytes).

    The buffer has two halves where there is more than one bucket: engines load from one while the
    trainer fills the other.
    """

    def __init__(self, filler: Filler, bucket_bytes: int) -> None:
        self._filler = filler
        self.manifest = filler.manifest
        buckets, half_bytes = plan_buckets(self.manifest, bucket_bytes)
        self.buckets = [
            Bucket(
                first=bucket.first,
                offsets=tuple(offset + number % 2 * half_bytes for offset in bucket.offsets),
            )
            for number, bucket in enumerate(buckets)
        ]
        self.buffer_bytes = half_bytes * min(2, len(buckets))
        super().__init__(len(buckets))

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, for vLLM's `WeightSource`."""
        return list(self.manifest)

    def fill_next(self, buffer: Tensor | None) -> list[int] | None:
        """Fill the next bucket; its checksums where they are wanted. Collective."""
        return self._filler.fill(self.buckets[self.take_round()], buffer)

    def follow_round(self) -> None:
        self.fill_next(None)

    def _attach(self, where: tuple[str, int] | None) -> None:
        self._filler.attach(where)

    def _begin(self) -> None:
        self._filler.begin(verify=self._verify)

    def _end(self) -> bool:
        self._filler.end()
        return True
