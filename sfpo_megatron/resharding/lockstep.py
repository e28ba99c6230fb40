"""One update on every rank: attach, begin, fill each bucket, end; the same order everywhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfpo_megatron.resharding.filling import Filler
from sfpo_megatron.resharding.transports.tensor_names import Bucket, plan_buckets


class Lockstep:
    """A filler with its buckets, which can be followed to the end from wherever a failure left it.

    The buffer has two halves where there is more than one bucket: engines load from one while the
    trainer fills the other.
    """

    def __init__(self, filler: Filler, bucket_bytes: int) -> None:
        self._filler = filler
        self.manifest = filler.manifest
        buckets, self._half_bytes = plan_buckets(self.manifest, bucket_bytes)
        self.buckets = [
            Bucket(
                first=bucket.first,
                offsets=tuple(offset + number % 2 * self._half_bytes for offset in bucket.offsets),
            )
            for number, bucket in enumerate(buckets)
        ]
        self.buffer_bytes = self._half_bytes * min(2, len(buckets))
        self._next = 0
        self._attached = self._begun = self._ended = True
        self._verify = False

    def metadata(self) -> list[Any]:
        """As vLLM's `WeightSource`."""
        return list(self.manifest)

    def restart(self, *, fresh: bool, verify: bool) -> None:
        """A new update, with a buffer that is new or the last one."""
        self._next, self._verify = 0, verify
        self._attached, self._begun, self._ended = not fresh, False, False

    def attach(self, file: tuple[str, int] | None) -> None:
        self._attached = True
        self._filler.attach(file)

    def begin(self) -> None:
        self._begun = True
        self._filler.begin(verify=self._verify)

    def fill_next(self, buffer: Tensor | None) -> list[int] | None:
        """The next bucket; its checksums where they are wanted."""
        bucket = self.buckets[self._next]
        self._next += 1
        return self._filler.fill(bucket, buffer)

    def end(self) -> None:
        self._ended = True
        self._filler.end()

    def follow(self) -> None:
        """Everything that is left, with nothing sent. Collective."""
        if not self._attached:
            self.attach(None)
        if not self._begun:
            self.begin()
        while self._next < len(self.buckets):
            self.fill_next(None)
        if not self._ended:
            self.end()
