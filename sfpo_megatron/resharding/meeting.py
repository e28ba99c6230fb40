"""Meeting the engines for vLLM's own transports: the place, and the trainer's ends there."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.addresses import own_address
from sfpo_megatron.resharding import transports
from sfpo_megatron.resharding.seams import Control, EngineClient, SendingEnd
from sfpo_megatron.resharding.source_pass import IntroductionFailed, Rendezvous, SourcePass


@dataclass(kw_only=True, frozen=True, slots=True)
class StockEnds:
    """Makes a rank's end of one of vLLM's own transports."""

    config: RunConfig
    driver: SourcePass
    control: Control
    shard_dims: list[int | None] | None = None
    """Dimension that each tensor is cut along, for nccl_m2n."""

    def place(self, client: EngineClient) -> Rendezvous:
        """Choose where the two sides meet, on the sender, and count who comes."""
        address = own_address()
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        per_engine = self.config.rollout.tensor_parallel
        return {
            "address": address,
            "port": port,
            "num_workers": client.num_engines() * per_engine,
            "workers_per_engine": per_engine,
            "num_ranks": self.control.size,
            "num_shards": self.config.parallel.tensor,
        }

    def meet(self, place: Rendezvous, client: EngineClient | None) -> SendingEnd:
        """Make this rank's end, which the engines know then; IntroductionFailed where they were
        lost meanwhile. `client`: None but on the sender. Collective where every rank has an end."""
        if not place["num_workers"]:
            raise IntroductionFailed
        return transports.meet(
            self.config.refit.backend,
            driver=self.driver,
            client=client,
            rank=self.control.rank,
            place=place,
            bucket_bytes=self.config.refit.bucket_bytes,
            timeout_s=self.config.refit.timeout_s,
            shard_dims=self.shard_dims,
        )
