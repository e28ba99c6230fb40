"""Refit: after an update, the trainer's weights go into every engine.

Every trainer rank calls `send`. shm: all fill buckets in lockstep (`filling.py`), and one rank, the
sender, hands them to the engines. gloo, nccl_stages: leaders broadcast (`streams.py`), and the
sender tells the engines to receive. vLLM's own transports read the source (`source_pass.py`): nccl
on the sender, the others on every rank. vllm is imported inside `transports`, on the ranks that
send.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch

from sfpo_megatron.config.rules.transports import with_transport
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.hf_files import mtp_prefixes
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.host.addresses import own_address
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.resharding import transports
from sfpo_megatron.resharding.filling import WeightSource, make_filler
from sfpo_megatron.resharding.lockstep import Lockstep
from sfpo_megatron.resharding.source_pass import IntroductionFailed, SourcePass
from sfpo_megatron.resharding.streams import Streams
from sfpo_megatron.resharding.transports.tensor_names import check_manifest, read_checkpoint_shapes


class Refit:
    """The trainer's end of weight updates. Construction is collective."""

    def __init__(
        self, config: RunConfig, *, source: WeightSource, client: Any, is_sender: bool
    ) -> None:
        """`client` is the `RolloutClient.sync_client` on the sender, None elsewhere."""
        self._control = getattr(source, "control", None)
        if config.refit.transport == "auto":
            of_engines: Any = client.transport if is_sender else None
            if self._control is not None:
                of_engines = self._control.broadcast_json(of_engines)
            config = with_transport(config, of_engines)
        self._config = config
        self._driver: Lockstep | Streams | SourcePass
        if config.refit.is_vllms_own:
            self._driver = _pass_over(config, source)
        elif config.refit.backend == "sfpo_shm":
            filler = make_filler(source, is_sender=is_sender)
            self._driver = Lockstep(filler, config.refit.bucket_bytes)
        else:
            self._driver = Streams(
                source,
                bucket_bytes=config.refit.bucket_bytes,
                backend=config.refit.backend.removeprefix("sfpo_").partition("_")[0],
                timeout_s=config.refit.transfer_timeout_s,
                is_sender=is_sender,
            )
        self._source: Any = source
        self._client = client
        self._is_sender = is_sender
        self._everyone_sends = config.refit.transport in ("ipc", "nccl_m2n")
        self._transport: Any = None
        self._why_missed: str | None = None

    def send(self, weight_version: int, *, resend: bool = False) -> int:
        """Refit every engine and stamp it `weight_version`; bytes sent (0 unless the sender, and
        where those that took part did not get it all).
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
        if self._everyone_sends:
            return self._send_from_everywhere(weight_version, fresh=fresh)
        if not self._is_sender:
            self._driver.follow()
            return 0
        try:
            if fresh:
                self._transport = self._make_transport()
            if self._transport is not None:
                return self._transport.send_weights(str(weight_version))
        except Exception:
            self._driver.follow()
            raise
        self._client.reach_nobody(self._why_missed)
        self._driver.follow()
        return 0

    def _needs_transport(self, weight_version: int, resend: bool) -> bool:
        self._client.prepare(weight_version, only_stale=resend)
        lost = self._transport is not None and self._transport.lost
        if self._client.needs_introduction() or lost:
            self.close()  # what the others know is unlinked: engines that are new need a new one
        return self._transport is None

    def _make_transport(self) -> Any:
        """Of the sender, which the engines know; None where they were lost meanwhile."""
        if isinstance(self._driver, SourcePass):
            return self._meet(self._rendezvous())
        return transports.sender(
            self._config.refit.backend,
            driver=self._driver,
            client=self._client,
            fallback_dir=RunDirectory.of(self._config.output_dir).path,
            timeout_s=self._config.refit.transfer_timeout_s,
            workers_per_engine=self._config.rollout.tensor_parallel,
        )

    # --- vLLM's own transports ----------------------------------------------------------------

    def _send_from_everywhere(self, weight_version: int, *, fresh: bool) -> int:
        """ipc, nccl_m2n: every rank has an end of vLLM's. Collective."""
        assert self._control is not None
        if fresh:
            self.close()
            told = self._control.broadcast_json(self._rendezvous() if self._is_sender else None)
            failure: Exception | None = None
            try:
                self._transport = self._meet(told)
            except Exception as error:  # all ranks hear of it before this one raises
                failure = error
            if self._any(self._transport is None):
                self.close()
            if failure is not None:
                raise failure
        if self._transport is None:
            if self._is_sender:
                self._client.reach_nobody(self._why_missed)
            return 0
        num_bytes = self._transport.send_weights(str(weight_version))
        self._transport.lost = self._any(self._transport.lost)
        return num_bytes if self._is_sender else 0

    def _any(self, mine: bool) -> bool:
        assert self._control is not None
        return bool(self._control.max(torch.tensor([float(mine)])).item())

    def _rendezvous(self) -> dict[str, Any]:
        """On the sender: where the two sides meet, and how many come."""
        address, parallel = own_address(), self._config.parallel
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        per_engine = self._config.rollout.tensor_parallel
        return {
            "address": address,
            "port": port,
            "num_workers": self._client.num_engines() * per_engine,
            "workers_per_engine": per_engine,
            "num_ranks": self._control.size if self._control is not None else 1,
            "num_shards": parallel.tensor,
        }

    def _meet(self, told: dict[str, Any]) -> Any:
        """This rank's end, None where the engines were lost meanwhile."""
        self._why_missed = None
        if not told["num_workers"]:
            return None
        is_m2n = self._config.refit.transport == "nccl_m2n"
        try:
            return transports.meet(
                self._config.refit.backend,
                driver=self._driver,
                client=self._client,
                rank=self._control.rank if self._control is not None else 0,
                told=told,
                bucket_bytes=self._config.refit.bucket_bytes,
                timeout_s=self._config.refit.timeout_s,
                shard_dims=self._source.shard_dims if is_m2n else None,
            )
        except IntroductionFailed as error:
            self._why_missed = str(error)
            return None

    def close(self) -> None:
        """Give the buffer back."""
        if self._transport is not None:
            self._transport.shutdown()
            self._transport = None


def _pass_over(config: RunConfig, source: Any) -> SourcePass:
    """What vLLM's own transports read, whose receivers do not compare names with the engine's
    checkpoint: `ManifestError` here, on every rank."""
    streams = {
        "nccl": lambda: iter(source),
        "ipc": lambda: source.everywhere(),
        "nccl_m2n": lambda: source.shards(),
    }
    driver = SourcePass(source.metadata(), streams[config.refit.transport])
    shape = model_shape(read_hf_config(config.model.path))
    check_manifest(
        driver.manifest,
        read_checkpoint_shapes(Path(config.model.path)),
        dtype=getattr(torch, config.model.dtype),
        tied_embeddings=shape.tied_embeddings,
        left_out=mtp_prefixes(shape.num_layers, shape.num_mtp_layers),
    )
    return driver
