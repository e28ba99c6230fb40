"""Refit: after an update, the trainer's weights go into every engine.

Every trainer rank calls `send`. shm: all fill buckets in lockstep (`filling.py`), and one rank, the
sender, hands them to the engines. gloo, nccl_stages: leaders broadcast (`streams.py`), and the
sender tells the engines to receive. vllm is imported on the sender only, inside `transports`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.resharding import transports
from sfpo_megatron.resharding.filling import WeightSource, make_filler
from sfpo_megatron.resharding.lockstep import Lockstep
from sfpo_megatron.resharding.streams import Streams


class Refit:
    """The trainer's end of weight updates. Construction is collective."""

    def __init__(
        self, config: RunConfig, *, source: WeightSource, client: Any, is_sender: bool
    ) -> None:
        """`client` is the `RolloutClient.sync_client` on the sender, None elsewhere."""
        self._config = config
        self._driver: Lockstep | Streams
        if config.refit.backend == "sfpo_shm":
            filler = make_filler(source, is_sender=is_sender)
            self._driver = Lockstep(filler, config.refit.bucket_bytes)
        else:
            self._driver = Streams(
                source,
                bucket_bytes=config.refit.bucket_bytes,
                backend=config.refit.backend.removeprefix("sfpo_").partition("_")[0],
                timeout_s=config.refit.timeout_s,
                is_sender=is_sender,
            )
        self._client = client
        self._is_sender = is_sender
        self._control = getattr(source, "control", None)
        self._transport: Any = None

    def send(self, weight_version: int, *, resend: bool = False) -> int:
        """Refit every engine and stamp it `weight_version`; bytes sent (0 unless the sender).
        `resend`: the engines' current weights again, for those that were started anew.

        An engine that fails is the fleet's matter and not an error here. Collective: every trainer
        rank calls it. If the sender itself fails, it still takes its part in the filling to the
        end and then raises, so that no other rank hangs in it.
        """
        every = self._config.refit.verify_every
        verify = every > 0 and weight_version % every == 0
        fresh = self._is_sender and self._needs_transport(weight_version, resend)
        if self._control is not None:
            fresh = self._control.broadcast_json(fresh)
        self._driver.restart(fresh=fresh, verify=verify)
        if not self._is_sender:
            self._driver.follow()
            return 0
        try:
            if fresh:
                self._transport = transports.sender(
                    self._config.refit.backend,
                    driver=self._driver,
                    client=self._client,
                    fallback_dir=Path(self._config.output_dir),
                    timeout_s=self._config.refit.timeout_s,
                    workers_per_engine=self._config.rollout.tensor_parallel,
                )
            return self._transport.send_weights(str(weight_version))
        except Exception:
            self._driver.follow()
            raise

    def _needs_transport(self, weight_version: int, resend: bool) -> bool:
        self._client.prepare(weight_version, only_stale=resend)
        lost = self._transport is not None and self._transport.lost
        if self._client.needs_introduction() or lost:
            self.close()  # what the others know is unlinked: engines that are new need a new one
        return self._transport is None

    def close(self) -> None:
        """Give the buffer back."""
        if self._transport is not None:
            self._transport.shutdown()
            self._transport = None
