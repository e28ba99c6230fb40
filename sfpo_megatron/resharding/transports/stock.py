"""vLLM's own transports, `nccl`, `ipc` and `nccl_m2n`: both ends are vLLM's, made by its factory;
ours are the source, the rendezvous, and a limit to how long a dead engine can hold the trainer.

nccl runs on the sender alone. ipc and nccl_m2n run on every trainer rank, vllm included. None of
them has a watchdog: a peer that is gone leaves the others in a broadcast for ever. So each update
runs under a `Limit`, which aborts the communicator: the source then ends the pass
(`TransferExpired`), the rest of it is followed with nothing sent, and the fleet, whose own deadline
ran at the same time, restarts the engines that took part.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.m2n_common import REPLICATE, M2NMesh, M2NParamMeta
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource
from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.resharding.seams import UpdateClient, WireInfo
from sfpo_megatron.resharding.source_pass import (
    IntroductionFailed,
    Rendezvous,
    SourcePass,
    packed_bytes,
)

GRACE_S = 10.0
"""Time between the last engine's answer and the end of the sender's part."""
_POLL_S = 0.05

log = logging.getLogger(__name__)


StockInitInfo: TypeAlias = IPCTrainerInitInfo | NCCLTrainerInitInfo | M2NTrainerInitInfo
"""What vLLM's factory makes one of its trainer engines of."""


class NcclLibrary(Protocol):
    """vLLM's binding of NCCL."""

    def ncclCommAbort(self, comm: Any) -> None: ...


class Communicator(Protocol):
    """vLLM's PyNcclCommunicator."""

    available: bool
    disabled: bool
    device: torch.device
    nccl: NcclLibrary
    comm: Any


class StockEngine(Protocol):
    """One of vLLM's own trainer engines."""

    def send_weights(self) -> None: ...
    def shutdown(self) -> None: ...


class TransferExpired(RuntimeError):
    """The engines did not take an update in time, or are gone: the source's word for vLLM."""


class Limit:
    """When it expires, the communicator is aborted and the pass ends at its next tensor."""

    def __init__(self, group: Callable[[], Communicator | None] | None) -> None:
        """`group()`: the communicator, once there is one. None: the transport has none that could
        hang, and there is no limit (ipc, whose every call the fleet's deadline ends)."""
        self._group = group
        self._timer: threading.Timer | None = None
        self.applies = group is not None
        self.expired = False

    def within(self, seconds: float) -> None:
        """Start the limit now, replacing an earlier one."""
        self.off()
        if not self.applies:
            return
        self._timer = threading.Timer(seconds, self.expire)
        self._timer.daemon = True
        self._timer.start()

    def off(self) -> None:
        """Lift the limit."""
        if self._timer is not None:
            self._timer.cancel()

    def expire(self) -> None:
        """Abort the communicator."""
        assert self._group is not None
        self.expired = True
        group = self._group()
        if group is not None and group.available and not group.disabled:
            # Closed to new calls first: after the abort the handle is freed memory.
            group.disabled, group.available = True, False
            with torch.accelerator.device_index(group.device.index):
                group.nccl.ncclCommAbort(group.comm)


class SteadyClient:
    """A client whose first failure ends no pass: the sender goes through the rest, reaching nobody,
    so that no other rank hangs in it. `raise_failure` says it afterwards."""

    def __init__(self, client: UpdateClient | None, limit: Limit) -> None:
        """`client`: None on ranks that do not send."""
        self._client, self._limit = client, limit
        self._busy = threading.Lock()
        self._failure: Exception | None = None
        self.answered = threading.Event()
        """A long call (introduction, or taking the weights) has ended, well or not."""

    def begin(self) -> None:
        self._failure = None
        self.answered.clear()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def init_weight_transfer_engine(self, init_info: WireInfo) -> None:
        self._call(lambda client: client.init_weight_transfer_engine(init_info))
        self.answered.set()

    def start_weight_update(self) -> None:
        self._call(lambda client: client.start_weight_update())

    def update_weights(self, update_info: WireInfo) -> None:
        self._call(lambda client: client.update_weights(update_info))
        self._limit.within(GRACE_S)
        self.answered.set()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._limit.off()  # everything is sent; re-packing takes the time it takes
        self._call(lambda client: client.finish_weight_update())

    def _call(self, call: Callable[[UpdateClient], int | None]) -> None:
        with self._busy:  # an update that has expired is still under way in another thread
            if self._failure is not None:
                return
            try:
                assert self._client is not None, "another rank than the sender calls the engines"
                call(self._client)
            except Exception as error:
                self._failure = error


class LimitedSource:
    """The pass, which ends when the limit has expired."""

    def __init__(self, driver: SourcePass, limit: Limit) -> None:
        self._driver, self._limit = driver, limit
        self.failure: BaseException | None = None
        """Failure of our own gathering, as opposed to vLLM's sending."""

    def metadata(self) -> list[TensorMeta]:
        return self._driver.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        items = iter(self._driver)
        while not self._limit.expired:
            try:
                item = next(items, None)
            except BaseException as error:
                self.failure = error
                raise
            if item is None:
                return
            yield item
        raise TransferExpired("the engines did not take an update in time, or are gone")


class ShardSource(LimitedSource, M2NWeightSource):
    """What nccl_m2n asks beside: the trainer's grid of ranks, and each tensor's place on it.

    Megatron's ranks run along tensor parallel first: data- and context-parallel replicas x shards.
    """

    def __init__(
        self, driver: SourcePass, limit: Limit, *, dims: list[int | None], grid: tuple[int, int]
    ) -> None:
        """`dims`: `MegatronWeightSource.shard_dims`. `grid`: (replicas, shards)."""
        super().__init__(driver, limit)
        self._dims, self._grid = dims, grid

    def mesh(self) -> M2NMesh:
        return M2NMesh(self._grid, 0)

    def metadata(self) -> list[M2NParamMeta]:
        return [
            M2NParamMeta(
                name=meta.name,
                dtype=meta.dtype,
                shape=meta.shape,
                placements=None if dim is None else (REPLICATE, dim),
            )
            for meta, dim in zip(self._driver.manifest, self._dims, strict=True)
        ]


def init_info(
    backend: str, driver: SourcePass, *, rank: int, bucket_bytes: int, place: Rendezvous
) -> StockInitInfo:
    """What vLLM's factory makes this rank's trainer engine of."""
    buffer_bytes = packed_bytes(driver.manifest, bucket_bytes)
    where = {"master_address": place["address"], "master_port": place["port"]}
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
    if backend == "nccl":
        return NCCLTrainerInitInfo(
            rank=rank,
            world_size=1 + place["num_workers"],
            packed=True,
            packed_buffer_size_bytes=buffer_bytes,
            **where,
        )
    assert backend == "nccl_m2n", backend
    per_engine = place["workers_per_engine"]
    return M2NTrainerInitInfo(
        rank=rank,
        world_size=place["num_ranks"] + place["num_workers"],
        num_trainer_ranks=place["num_ranks"],
        dst_mesh_dims=(place["num_workers"] // per_engine, per_engine),
        **where,
    )


class StockTransport:
    """vLLM's trainer engine on one trainer rank."""

    def __init__(
        self,
        info: StockInitInfo,
        *,
        driver: SourcePass,
        source: Callable[[SourcePass, Limit], LimitedSource],
        client: UpdateClient | None,
        timeout_s: float,
    ) -> None:
        """Meet the engines. `source(driver, limit)` makes what vLLM reads; `client` is None but on
        the sender. IntroductionFailed where they do not come. Collective where every rank has one.
        """
        log_unverified(f"refit.transport {info.backend}")
        self._driver, self._timeout_s = driver, timeout_s
        self._engine: StockEngine | None = None
        self._group_name = "group" if info.backend == "nccl_m2n" else "model_update_group"
        self._limit = Limit(None if info.backend == "ipc" else self._group)
        self._client = SteadyClient(client, self._limit)
        self._is_sender = client is not None
        self.lost = False
        """The communicator is of no use any more."""
        self._source = source(driver, self._limit)
        self._introduce(info)

    def _group(self) -> Communicator | None:
        """nccl's and nccl_m2n's communicator, by the names that they give it."""
        return getattr(self._engine, self._group_name)

    def _introduce(self, info: StockInitInfo) -> None:
        """Join the communicator in a thread: that cannot be given up otherwise, and the engines'
        answer, which may be that they are gone, comes in another one."""
        device = torch.accelerator.current_device_index()
        done, failure = threading.Event(), list[BaseException]()

        def join() -> None:
            try:
                torch.accelerator.set_device_index(device)
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    info, client=self._client, source=self._source
                )
            except BaseException as error:
                failure.append(error)
            done.set()

        self._client.begin()
        threading.Thread(target=join, daemon=True, name="refit rendezvous").start()
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline and not self._client.answered.is_set():
            if done.wait(_POLL_S):
                break
        came = done.wait(GRACE_S)
        self._client.raise_failure()
        if failure and not isinstance(failure[0], RuntimeError):
            raise failure[0]
        if failure or not came:  # NCCL and the store raise RuntimeError where a peer is gone
            why = failure[0] if failure else f"nobody came within {self._timeout_s:g} s"
            raise IntroductionFailed(f"the refit's communicator could not be made: {why}")

    def send_weights(self, weight_version: str) -> int:
        """Send one refit; the number of bytes sent, 0 where the engines are lost that took part.
        Collective: also for ranks that have no transport (`SourcePass.follow`)."""
        assert self._engine is not None, "no engine came: the constructor has raised"
        self._client.begin()
        self._limit.within(self._timeout_s + GRACE_S)
        broke_off = False
        try:
            self._engine.send_weights()
        except RuntimeError as error:  # NCCL's own, where it notices that a peer is gone
            if not self._limit.applies or self._source.failure is error:
                raise
            log.warning("a refit broke off: %s", error)
            broke_off = True
            self._limit.expire()
        finally:
            self._limit.off()
            self.lost = self._limit.expired
            self._driver.follow()
        if broke_off and self._is_sender:
            self._client.finish_weight_update()
        self._client.raise_failure()
        return 0 if self.lost else sum(meta.num_bytes for meta in self._driver.manifest)

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


def meet(
    backend: str,
    driver: SourcePass,
    *,
    client: UpdateClient | None,
    rank: int,
    place: Rendezvous,
    bucket_bytes: int,
    timeout_s: float,
    shard_dims: list[int | None] | None,
) -> StockTransport:
    """Make a transport on this rank that the engines know. `shard_dims`: for nccl_m2n."""
    info = init_info(backend, driver, rank=rank, bucket_bytes=bucket_bytes, place=place)

    def source(driver: SourcePass, limit: Limit) -> LimitedSource:
        if shard_dims is None:
            return LimitedSource(driver, limit)
        shards = place["num_shards"]
        grid = (place["num_ranks"] // shards, shards)
        return ShardSource(driver, limit, dims=shard_dims, grid=grid)

    return StockTransport(info, driver=driver, source=source, client=client, timeout_s=timeout_s)
