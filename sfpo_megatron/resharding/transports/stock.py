"""vLLM's own transports, `nccl`, `ipc` and `nccl_m2n`: both ends are vLLM's, made by its factory;
ours are the source, the rendezvous, and a limit to how long a dead engine can hold the trainer.

nccl runs on the sender alone. ipc and nccl_m2n run on every trainer rank, vllm included. None of
them has a watchdog: a peer that is gone leaves the others in a broadcast for ever. So each update
runs under a `Limit`, which aborts the communicator: the source then ends the pass
(`TransferExpired`), the rest of it is followed with nothing sent, and the fleet, whose own deadline
ran at the same time, starts the engines that took part anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.m2n_common import REPLICATE, M2NMesh, M2NParamMeta
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource
from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.resharding.source_pass import IntroductionFailed, SourcePass, packed_bytes

GRACE_S = 10.0
"""Between the last engine's answer and the end of the sender's part."""


_POLL_S = 0.05

log = logging.getLogger(__name__)


class TransferExpired(RuntimeError):
    """The engines did not take an update in time, or are gone: the source's word for vLLM."""


class Limit:
    """When it expires, the communicator is aborted and the pass ends at its next tensor."""

    def __init__(self, group: Callable[[], Any] | None) -> None:
        """`group()`: vLLM's PyNcclCommunicator. None: the transport has none that could hang, and
        there is no limit (ipc, whose every call the fleet's deadline ends)."""
        self._group = group
        self._timer: threading.Timer | None = None
        self.applies = group is not None
        self.expired = False

    def within(self, seconds: float) -> None:
        """From now; an earlier wish is forgotten."""
        self.off()
        if not self.applies:
            return
        self._timer = threading.Timer(seconds, self.expire)
        self._timer.daemon = True
        self._timer.start()

    def off(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def expire(self) -> None:
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

    def __init__(self, client: Any, limit: Limit) -> None:
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

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)
        self.answered.set()

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)
        self._limit.within(GRACE_S)
        self.answered.set()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._limit.off()  # everything is sent; re-packing takes the time it takes
        self._call("finish_weight_update")

    def _call(self, method: str, *args: Any) -> None:
        with self._busy:  # an update that has expired is still under way in another thread
            if self._failure is not None:
                return
            try:
                getattr(self._client, method)(*args)
            except Exception as error:
                self._failure = error


class LimitedSource:
    """The pass, which ends when the limit has expired."""

    def __init__(self, driver: SourcePass, limit: Limit) -> None:
        self._driver, self._limit = driver, limit
        self.failure: BaseException | None = None
        """Of our own gathering, as opposed to vLLM's sending."""

    def metadata(self) -> list[Any]:
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

    def metadata(self) -> list[Any]:
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
    backend: str, driver: SourcePass, *, rank: int, bucket_bytes: int, told: dict[str, Any]
) -> Any:
    """Of vLLM's factory. `told`: `address`, `port` of the rendezvous, `num_workers` of the engines
    that will come, `num_ranks` of the trainer, `workers_per_engine`."""
    buffer_bytes = packed_bytes(driver.manifest, bucket_bytes)
    where = {"master_address": told["address"], "master_port": told["port"]}
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
    if backend == "nccl":
        return NCCLTrainerInitInfo(
            rank=rank,
            world_size=1 + told["num_workers"],
            packed=True,
            packed_buffer_size_bytes=buffer_bytes,
            **where,
        )
    assert backend == "nccl_m2n", backend
    per_engine = told["workers_per_engine"]
    return M2NTrainerInitInfo(
        rank=rank,
        world_size=told["num_ranks"] + told["num_workers"],
        num_trainer_ranks=told["num_ranks"],
        dst_mesh_dims=(told["num_workers"] // per_engine, per_engine),
        **where,
    )


class StockTransport:
    """vLLM's trainer engine on one trainer rank."""

    def __init__(
        self, info: Any, *, driver: SourcePass, source: Any, client: Any, timeout_s: float
    ) -> None:
        """Meets the engines. `source(driver, limit)` makes what vLLM reads; `client` is None but on
        the sender. IntroductionFailed where they do not come. Collective where every rank has one.
        """
        log_unverified(f"refit.transport {info.backend}")
        self._driver, self._timeout_s = driver, timeout_s
        self._engine: Any = None
        self._limit = Limit(None if info.backend == "ipc" else self._group)
        self._client = SteadyClient(client, self._limit)
        self._is_sender = client is not None
        self.lost = False
        """The communicator is of no use any more."""
        self._source = source(driver, self._limit)
        self._introduce(info)

    def _group(self) -> Any:
        """nccl's and nccl_m2n's communicator, by the names that they give it."""
        name = "group" if self._engine.init_info_cls is M2NTrainerInitInfo else "model_update_group"
        return getattr(self._engine, name)

    def _introduce(self, info: Any) -> None:
        """In a thread of its own: joining a communicator cannot be given up otherwise, and the
        engines' answer, which may be that they are gone, comes in another one."""
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
        """One refit; the number of bytes sent, 0 where the engines are lost that took part.
        Collective: also for ranks that have no transport (`SourcePass.follow`)."""
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
    client: Any,
    rank: int,
    told: dict[str, Any],
    bucket_bytes: int,
    timeout_s: float,
    shard_dims: list[int | None] | None,
) -> StockTransport:
    """A transport on this rank that the engines know. `shard_dims`: for nccl_m2n."""
    info = init_info(backend, driver, rank=rank, bucket_bytes=bucket_bytes, told=told)

    def source(driver: SourcePass, limit: Limit) -> Any:
        if shard_dims is None:
            return LimitedSource(driver, limit)
        shards = told["num_shards"]
        grid = (told["num_ranks"] // shards, shards)
        return ShardSource(driver, limit, dims=shard_dims, grid=grid)

    return StockTransport(info, driver=driver, source=source, client=client, timeout_s=timeout_s)
