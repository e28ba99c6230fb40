"""`sfpo_gloo` and `sfpo_nccl_stages`: every leader of the trainer broadcasts to all engine workers;
both sides of it (the trainer's ranks are in `streams.py`).

    trainer rank 0                                every engine worker
    --------------                                -------------------
    declare the plan and a store to meet in  ->   check the manifest
    start                                    ->   begin vLLM's layerwise reload
    first round                              ->   once all have come to the store, join one
                                                  communicator for each leader
    for each round: update                   ->   receive a bucket from every leader, load them
      meanwhile all leaders broadcast theirs
    finish                                   ->   all arrived? re-pack; done
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from sfpo_megatron.host.addresses import choose_gloo_interface
from sfpo_megatron.resharding.roll_call import members, roll_call
from sfpo_megatron.resharding.seams import UpdateClient, WireInfo
from sfpo_megatron.resharding.streams import (
    Communicator,
    Streams,
    broadcast,
    communicator,
    finish,
    layout,
)
from sfpo_megatron.resharding.transports.receiving import Receiver
from sfpo_megatron.resharding.transports.tensor_names import declaration


@dataclass(kw_only=True)
class StagesInitInfo(WeightTransferInitInfo):
    """What an engine worker is told once."""

    address: str
    port: int
    num_workers: int
    """Number of workers of all engines; the fleet fills it in."""
    engine_number: int
    """Place of this engine among them; the fleet fills it in."""
    timeout_s: float
    leaders: list[int]
    rounds: list[list[list[int]]]
    """Tensors of each round, by leader."""
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass(kw_only=True)
class StagesUpdateInfo(WeightTransferUpdateInfo):
    """What an engine worker is told of each round."""

    number: int
    checksums: list[int] | None = None
    """Checksums of all tensors (signed 64 bits), where they are to be compared."""


class StagesEngine(Receiver):
    """The receiving end, one in each engine worker (tensor-parallel rank)."""

    init_info_cls = StagesInitInfo
    update_info_cls = StagesUpdateInfo
    backend = "gloo"

    _groups: tuple[Communicator, ...] = ()
    _store: dist.Store | None = None
    _told: StagesInitInfo | None = None

    def init_transfer_engine(self, init_info: StagesInitInfo) -> None:
        """Refuse a manifest that is not this engine's checkpoint: before anybody waits for us."""
        self.take_manifest(init_info.names, init_info.dtype_names, init_info.shapes)
        self.shutdown()
        self._told = init_info

    def _join(self, told: StagesInitInfo) -> None:
        """Meet every leader."""
        choose_gloo_interface(peer=told.address)
        limit = timedelta(seconds=told.timeout_s)
        store = self._store = dist.TCPStore(
            told.address, told.port, is_master=False, wait_for_workers=False, timeout=limit
        )
        parallel = self.parallel_config
        worker = told.engine_number * parallel.world_size + parallel.rank
        everybody = members(told.leaders, told.num_workers)
        roll_call(store, f"engine worker {worker}", everybody, told.timeout_s)
        self._groups = tuple(
            communicator(
                store,
                f"leader/{leader}",
                rank=1 + worker,
                size=1 + told.num_workers,
                backend=self.backend,
                timeout_s=told.timeout_s,
            )
            for leader in told.leaders
        )

    def receive_weights(self, update_info: StagesUpdateInfo) -> None:
        """Load one round. After a leader or another worker is gone, or late, the rest of the update
        is left out, and the engine says so when it is asked (`WorkerReports`)."""
        assert self._told is not None
        if self.interruption is not None:
            return
        arriving = []
        try:
            if not self._groups:
                self._join(self._told)
            for group, rounds in zip(self._groups, self._told.rounds, strict=True):
                indices = rounds[update_info.number]
                offsets, num_bytes = layout(self._manifest, indices)
                if indices:
                    bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
                    arriving.append((broadcast(group, bucket), bucket, indices, offsets))
            for work, *_ in arriving:
                finish(work, self._told.timeout_s, self._store)
        except RuntimeError as error:
            self.interruption = f"round {update_info.number}: {error}"
            self.shutdown()
            return
        tensors: list[tuple[str, Tensor]] = []
        sums: list[int] = []
        for _, bucket, indices, offsets in arriving:
            for index, offset in zip(indices, offsets, strict=True):
                meta = self._manifest[index]
                raw = bucket[offset : offset + meta.num_bytes]
                tensors.append((meta.name, raw.view(meta.dtype).view(meta.shape)))
                sums.append(update_info.checksums[index] if update_info.checksums else 0)
        # Not copied: each round has buckets of its own, which live as long as a layer waits.
        self.load(tensors, sums if update_info.checksums else None)

    def shutdown(self) -> None:
        for group in self._groups:
            group.abort()
        self._groups, self._store = (), None


class NcclStagesEngine(StagesEngine):
    """The receiving end over NCCL."""

    backend = "nccl"


@dataclass(kw_only=True)
class StagesTrainerInitInfo(TrainerInitInfo):
    """How the sending end is set up."""

    backend: ClassVar[str] = "sfpo_gloo"
    timeout_s: float
    workers_per_engine: int


@dataclass(kw_only=True)
class NcclStagesTrainerInitInfo(StagesTrainerInitInfo):
    """How the sending end over NCCL is set up."""

    backend: ClassVar[str] = "sfpo_nccl_stages"


class StagesTrainer(TrainerWeightTransferEngine[StagesTrainerInitInfo]):
    """The sending end's control, on trainer rank 0."""

    init_info_cls = StagesTrainerInitInfo

    def __init__(
        self, *, client: UpdateClient, streams: Streams, init_info: StagesTrainerInitInfo
    ) -> None:
        super().__init__(client=client, source=streams, is_sender=True)
        self._streams = streams
        # Engines take a round while leaders send it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update_weights")
        self.lost = False
        """The communicators are of no use any more."""
        self._introduce(init_info)

    @classmethod
    def trainer_init(
        cls,
        init_info: StagesTrainerInitInfo,
        *,
        client: UpdateClient,
        source: Streams | None = None,
    ) -> Self:
        if source is None:
            raise ValueError(f"{init_info.backend} sends whole models: trainer_init needs a source")
        return cls(client=client, streams=source, init_info=init_info)

    def _introduce(self, init_info: StagesTrainerInitInfo) -> None:
        streams, manifest = self._streams, self._streams.manifest
        address, port = streams.serve()
        num_engines = self.client.init_weight_transfer_engine(
            {
                "address": address,
                "port": port,
                "num_workers": 0,
                "engine_number": 0,
                "timeout_s": init_info.timeout_s,
                "leaders": [stream.leader for stream in streams.plan],
                "rounds": [[list(r) for r in stream.rounds] for stream in streams.plan],
                **declaration(manifest),
            }
        )
        num_workers = num_engines * init_info.workers_per_engine
        streams.attach({"address": address, "port": port, "num_workers": num_workers})

    def send_weights(self, weight_version: str | None = None) -> int:
        """Send one refit; the number of bytes sent, 0 if a leader could not get its tensors out:
        the engines that were in it say so too, and want everything again. Collective."""
        streams = self._streams
        self.client.start_weight_update()
        streams.begin()
        rounds = []
        for number in range(streams.num_rounds):
            update: WireInfo = {"number": number}
            if streams.checksums is not None:
                update["checksums"] = streams.checksums
            rounds.append(self._thread.submit(self.client.update_weights, update))
        for _ in rounds:
            streams.next_round()
        whole = streams.end()
        self.lost = not whole
        for answer in rounds:
            answer.result()
        self.client.finish_weight_update(weight_version)
        return sum(meta.num_bytes for meta in streams.manifest) if whole else 0

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._streams.abort()
