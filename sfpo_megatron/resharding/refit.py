"""Refit: after an update, the trainer's weights go into every engine.

Every trainer rank calls `send`. shm: all fill buckets in lockstep (`filling.py`), and one rank, the
sender, hands them to the engines. gloo, nccl_stages: leaders broadcast (`streams.py`), and the
sender tells the engines to receive. vLLM's own transports read the source (`source_pass.py`): nccl
on the sender, the others on every rank. vllm is imported inside `transports`, on the ranks that
send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfpo_megatron.config.rollout import Transport
from sfpo_megatron.config.rules.transports import with_transport
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.weight_names import mtp_prefixes
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.resharding import transports
from sfpo_megatron.resharding.filling import make_filler, manifest_of
from sfpo_megatron.resharding.meeting import StockEnds
from sfpo_megatron.resharding.parts import EveryRank, Follower, Part, Sender
from sfpo_megatron.resharding.seams import Driver, EngineClient, SendingEnd, WeightSource
from sfpo_megatron.resharding.shm_update import Lockstep
from sfpo_megatron.resharding.source_pass import SourcePass
from sfpo_megatron.resharding.streams import Streams
from sfpo_megatron.resharding.transports.tensor_names import check_manifest, read_checkpoint_shapes


class Refit:
    """The trainer's end of weight updates. Construction is collective."""

    def __init__(
        self, config: RunConfig, *, source: WeightSource, client: EngineClient | None
    ) -> None:
        """`client`: `RolloutClient.sync_client` on the sender, trainer rank 0; None elsewhere."""
        self._control = source.control
        if config.refit.transport == "auto":
            of_engines: Transport = "auto" if client is None else client.transport
            config = with_transport(config, self._control.broadcast_json(of_engines))
        self._verify_every = config.refit.verify_every
        self._client = client
        self._driver: Driver
        self._part: Part
        if config.refit.is_vllms_own:
            self._driver, self._part = _over_vllms_own(config, source, client)
        else:
            self._driver = driver = _our_driver(config, source)
            self._part = Follower(driver)
            if client is not None:
                self._part = Sender(driver, client, partial(_our_end, config, driver, client))

    def send(self, weight_version: int, *, only_stale: bool = False) -> int:
        """Refit every engine and stamp it `weight_version`; bytes sent (0 unless the sender, and
        where those that took part did not get it all).
        `only_stale`: send the current weights again, to engines without them: they were restarted.

        An engine that fails is the fleet's matter and not an error here. Collective: every trainer
        rank calls it. If the sender itself fails, it still takes its part in the filling to the
        end and then raises, so that no other rank hangs in it.
        """
        verify = self._verify_every > 0 and weight_version % self._verify_every == 0
        if self._client is not None:
            self._client.prepare(weight_version, only_stale=only_stale)
        fresh = self._control.broadcast_json(self._part.needs_new_end())
        self._driver.restart(fresh=fresh, verify=verify)
        return self._part.send(str(weight_version), fresh=fresh)

    def close(self) -> None:
        """Give the buffer back."""
        self._part.close()


def _our_driver(config: RunConfig, source: WeightSource) -> Lockstep | Streams:
    """What every rank goes through with a transport of ours. Collective."""
    if config.refit.backend == "sfpo_shm":
        return Lockstep(make_filler(source), config.refit.bucket_bytes)
    if source.sharded is None:
        raise _no_shards(config)
    return Streams(
        source.sharded,
        bucket_bytes=config.refit.bucket_bytes,
        backend=config.refit.backend.removeprefix("sfpo_").partition("_")[0],
        timeout_s=config.refit.transfer_timeout_s,
    )


def _our_end(config: RunConfig, driver: Driver, client: EngineClient) -> SendingEnd:
    return transports.sender(
        config.refit.backend,
        driver=driver,
        client=client,
        fallback_dir=RunDirectory.of(config.output_dir).path,
        timeout_s=config.refit.transfer_timeout_s,
        workers_per_engine=config.rollout.tensor_parallel,
    )


def _over_vllms_own(
    config: RunConfig, source: WeightSource, client: EngineClient | None
) -> tuple[SourcePass, Part]:
    driver, control = _pass_over(config, source), source.control
    is_m2n = config.refit.transport == "nccl_m2n"
    dims = source.sharded.shard_dims if is_m2n and source.sharded is not None else None
    ends = StockEnds(config=config, driver=driver, control=control, shard_dims=dims)
    if config.refit.transport != "nccl":
        return driver, EveryRank(ends, control, client)
    if client is None:
        return driver, Follower(driver)
    return driver, Sender(driver, client, lambda: ends.meet(ends.place(client), client))


def _pass_over(config: RunConfig, source: WeightSource) -> SourcePass:
    """What vLLM's own transports read, whose receivers do not compare names with the engine's
    checkpoint: `ManifestError` here, on every rank."""
    prepare = source.sharded.prepare if source.sharded is not None else _nothing
    driver = SourcePass(manifest_of(source), _stream_of(config, source), prepare)
    shape = model_shape(read_hf_config(config.model.path))
    check_manifest(
        driver.manifest,
        read_checkpoint_shapes(Path(config.model.path)),
        dtype=getattr(torch, config.model.dtype),
        tied_embeddings=shape.tied_embeddings,
        left_out=mtp_prefixes(shape.num_layers, shape.num_mtp_layers),
    )
    return driver


def _stream_of(
    config: RunConfig, source: WeightSource
) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """What a pass yields: nccl's sender has full tensors, ipc every rank, nccl_m2n its slices."""
    if config.refit.transport == "nccl":
        return source.__iter__
    if source.sharded is None:
        raise _no_shards(config)
    return source.sharded.everywhere if config.refit.transport == "ipc" else source.sharded.shards


def _nothing() -> None:
    """Prepare a source of whole tensors: nothing of it has to be gathered beforehand."""


def _no_shards(config: RunConfig) -> ValueError:
    return ValueError(
        f"refit.transport: found {config.refit.transport} with a source of whole tensors, expected "
        "the trainer's shards (`WeightSource.sharded`); set it to shm"
    )
