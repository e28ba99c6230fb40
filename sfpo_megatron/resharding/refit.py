"""Refit: after an update, the trainer's weights go into every engine.

Every trainer rank calls `send`: iterating the source gathers shards, which is collective. One rank,
the sender, writes what it gathers into the transport; the others take part and drop it. vllm is
imported on the sender only, inside `transports`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.resharding import transports


class WeightSource(Protocol):
    """Full Hugging Face tensors, in the same order on every rank (vLLM's `WeightSource`)."""

    def metadata(self) -> list[Any]:
        """Objects with `.name .shape .dtype`, the same list on every rank."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Gather one tensor after another (collective); a tensor counts on the sender only."""


class Refit:
    """The trainer's end of weight updates."""

    def __init__(
        self, config: RunConfig, *, source: WeightSource, client: Any, is_sender: bool
    ) -> None:
        """`client` is the `RolloutClient.sync_client` on the sender, None elsewhere."""
        self._config = config
        self._stream = _OneIteration(source)
        self._client = client
        self._is_sender = is_sender
        self._transport: Any = None

    def send(self, weight_version: int, *, resend: bool = False) -> int:
        """Refit every engine and stamp it `weight_version`; bytes sent (0 unless the sender).
        `resend`: the engines' current weights again, for those that were started anew.

        An engine that fails is the fleet's matter and not an error here. Collective: every trainer
        rank calls it. If the sender itself fails, it still takes its part in the gathering to the
        end and then raises, so that no other rank hangs in it.
        """
        self._stream.restart()
        if not self._is_sender:
            self._stream.drain()
            return 0
        try:
            return self._send(weight_version, resend)
        except Exception:
            self._stream.drain()
            raise

    def _send(self, weight_version: int, resend: bool) -> int:
        self._client.prepare(weight_version, only_stale=resend)
        if self._client.needs_introduction():
            self.close()  # what all knew is unlinked: engines that are new need a new buffer
        if self._transport is None:
            self._transport = transports.sender(
                self._config.refit.backend,
                source=self._stream,
                client=self._client,
                bucket_bytes=self._config.refit.bucket_bytes,
                fallback_dir=Path(self._config.output_dir),
            )
        return self._transport.send_weights(str(weight_version))

    def close(self) -> None:
        """Give the buffer back."""
        if self._transport is not None:
            self._transport.shutdown()
            self._transport = None


class _OneIteration:
    """One pass over the source per refit, which can be drained from where a failure left it."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        # Here, where every rank comes by: a source may have to communicate to know it.
        self._metadata = source.metadata()
        self._iterator: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[Any]:
        return self._metadata

    def restart(self) -> None:
        self._iterator = iter(self._source)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._iterator

    def drain(self) -> None:
        for _ in self._iterator:
            pass
