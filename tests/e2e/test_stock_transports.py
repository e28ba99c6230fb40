"""vLLM's own transports: our side against the installed vLLM's signatures, fields and names, and
what we do when engines are gone, with stand-ins for NCCL.

Not exercised: CUDA, NCCL, IPC handles; none of these transports has ever moved a byte here. The
source that they read is tested with real shards in tests/dist/test_export.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer import (
    factory,
    m2n_common,
    m2n_trainer,
    nccl_engine,
    packed_tensor,
)
from vllm.distributed.weight_transfer import ipc_engine as ipc
from vllm.distributed.weight_transfer import m2n_engine as m2n
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.source_pass import IntroductionFailed, SourcePass, packed_bytes
from sfpo_megatron.resharding.transports import stock

STATE = {name: torch.full((4, 6), float(i)) for i, name in enumerate("abcd")}
MANIFEST = [TensorMeta(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in STATE.items()]
PLACE = {
    "address": "10.0.0.1",
    "port": 1234,
    "num_workers": 4,
    "workers_per_engine": 4,
    "num_ranks": 8,
    "num_shards": 2,
}


def make_driver() -> SourcePass:
    return SourcePass(MANIFEST, lambda: iter(STATE.items()))


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


# --- upstream's contract ----------------------------------------------------------------------


def test_names_in_both_factories() -> None:
    for backend in ("nccl", "ipc", "nccl_m2n"):
        assert backend in factory.WeightTransferEngineFactory._registry
        assert backend in factory.WeightTransferTrainerFactory._registry
        trainer = factory.WeightTransferTrainerFactory._registry[backend]()
        assert trainer.init_info_cls.backend == backend
        parameters = inspect.signature(trainer.trainer_init).parameters
        assert list(parameters) == ["init_info", "client", "source"]
        assert list(inspect.signature(trainer.send_weights).parameters) == ["self"]


def test_fields_of_what_is_told() -> None:
    assert {"packed", "packed_buffer_size_bytes", "rank"} <= fields(ipc.IPCTrainerInitInfo)
    assert {"rank_offset", "world_size"} <= fields(NCCLWeightTransferInitInfo)
    assert {"rank_offset", "world_size"} <= fields(m2n.M2NWeightTransferInitInfo)
    info = stock.init_info("nccl", make_driver(), rank=0, bucket_bytes=64, place=PLACE)
    assert (info.world_size, info.packed, info.packed_buffer_size_bytes) == (5, True, 96)
    info = stock.init_info("ipc", make_driver(), rank=3, bucket_bytes=1000, place=PLACE)
    assert (info.packed, info.packed_buffer_size_bytes, info.is_sender) == (True, 1000, False)
    info = stock.init_info("nccl_m2n", make_driver(), rank=3, bucket_bytes=0, place=PLACE)
    assert (info.world_size, info.num_trainer_ranks) == (12, 8)
    assert info.destination_mesh_dims == (1, 4)


def test_the_workers_ranks_are_counted_from_rank_offset() -> None:
    """Which the fleet gives each engine (nccl); nccl_m2n plans with it too: one engine alone."""
    from vllm.distributed.weight_transfer import nccl_common

    source = inspect.getsource(nccl_common.worker_init_process_group)
    assert "rank = worker_rank + init_info.rank_offset" in source
    assert "rank_offset=1" in inspect.getsource(nccl_engine.NCCLTrainerWeightTransferEngine)
    source = inspect.getsource(m2n.M2NWeightTransferEngine.init_transfer_engine)
    assert "self._src_mesh.size != init_info.rank_offset" in source
    assert m2n_common.MAX_SOURCE_SHARDS == 16


def test_communicators_can_be_aborted() -> None:
    source = inspect.getsource(PyNcclCommunicator)
    for name in ("self.nccl", "self.comm", "self.device", "self.available", "self.disabled"):
        assert f"{name} = " in source or f"{name}: " in source, name
    assert "if self.disabled:\n            return" in inspect.getsource(
        PyNcclCommunicator.broadcast
    )
    assert list(inspect.signature(NCCLLibrary.ncclCommAbort).parameters) == ["self", "comm"]
    assert "engine.group = " in inspect.getsource(m2n_trainer.M2NTrainerWeightTransferEngine)
    assert "engine.model_update_group = " in inspect.getsource(nccl_engine)


def test_ipc_refuses_a_tensor_larger_than_its_buffer() -> None:
    """So the buffer is the largest tensor's, if that is larger than a bucket."""
    source = inspect.getsource(packed_tensor.packed_ipc_producer)
    assert "if flat.numel() > buffer_size_bytes:\n            raise ValueError" in source
    assert packed_bytes(MANIFEST, 64) == 96 and packed_bytes(MANIFEST, 128) == 128


def test_handles_reach_the_workers_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through vLLM's own serialization, which takes classes and dtypes only if it is told to."""
    from vllm import envs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    handles = {"GPU-1": (torch.Tensor, torch.Size([4]), (1,), 0, torch.float32, b"handle")}
    update = dataclasses.asdict(
        ipc.IPCWeightTransferUpdateInfo(
            names=["a"],
            dtype_names=["float32"],
            shapes=[[4]],
            ipc_handles=handles,
            tensor_sizes=[16],
        )
    )
    # Not by the environment: vLLM reads it once in a process that has had an engine.
    monkeypatch.setattr(envs, "VLLM_ALLOW_INSECURE_SERIALIZATION", False, raising=False)
    with pytest.raises(TypeError, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        MsgpackEncoder().encode(update)
    monkeypatch.setattr(envs, "VLLM_ALLOW_INSECURE_SERIALIZATION", True, raising=False)
    got = MsgpackDecoder().decode(MsgpackEncoder().encode(update))
    assert tuple(got["ipc_handles"]["GPU-1"])[4:] == (torch.float32, b"handle")
    assert got["ipc_handles"]["GPU-1"][0] is torch.Tensor


def test_the_source_is_one_that_vllm_takes() -> None:
    limit = stock.Limit(None)
    names = {n for n in dir(WeightSource) if not n.startswith("_")} - {"held_names", "groups"}
    assert names == {"metadata", "iter_groups"}, "the API has grown"
    checked = nccl_engine.NCCLTrainerWeightTransferEngine._checked_iter
    source = stock.LimitedSource(make_driver(), limit)
    assert dict(checked(source, source.metadata())).keys() == STATE.keys()
    driver = make_driver()
    shards = stock.ShardSource(driver, limit, dims=[0, 1, None, 1], grid=(4, 2))
    assert isinstance(shards, m2n_trainer.M2NWeightSource)
    assert shards.mesh() == m2n_common.M2NMesh((4, 2), 0)
    for meta in shards.metadata():
        m2n_common.check_transferable(meta.name, meta.dtype, meta.shape)
        mesh, placements = m2n_common.resolve_layout(shards.mesh(), meta.placements)
        m2n_common.validate_layout(mesh, placements, meta.shape, "source")
    assert [m.placements for m in shards.metadata()] == [(-1, 0), (-1, 1), None, (-1, 1)]
    # What vLLM tells the engine is what its engine reads.
    engine = m2n_trainer.M2NTrainerWeightTransferEngine(
        client=None, source=shards, is_controller=True, num_trainer_ranks=8
    )
    engine._src_mesh, engine._metas = shards.mesh(), shards.metadata()
    info = stock.init_info("nccl_m2n", driver, rank=0, bucket_bytes=0, place=PLACE)
    m2n.M2NWeightTransferInitInfo(**engine._worker_init_info(info))


# --- when engines are gone --------------------------------------------------------------------


class Group:
    """A communicator whose broadcast hangs until it is aborted, as NCCL's does without a peer."""

    available, disabled = True, False
    device, comm = torch.device("cpu", 0), "handle"

    def __init__(self, hangs_at: int | None, *, notices: bool) -> None:
        """`notices`: it raises instead, as NCCL may."""
        self.nccl = self
        self.notices = notices
        self.sent: list[Any] = []
        self._hangs_at = hangs_at
        self._aborted = threading.Event()

    def broadcast(self, tensor: Tensor) -> None:
        assert not self._aborted.is_set(), "freed memory"
        if len(self.sent) == self._hangs_at:
            if self.notices:
                raise RuntimeError("NCCL error: remote process exited")
            assert self._aborted.wait(20), "nobody aborted"
            return
        self.sent.append(tensor)

    def ncclCommAbort(self, comm: str) -> None:
        assert comm == "handle" and self.disabled
        self._aborted.set()


class Client:
    """The fleet's answers: `takes(update)` returns when the engines have it, or are gone."""

    def __init__(self, takes: Callable[[], None] = lambda: None, meets: Any = lambda: None) -> None:
        self.calls: list[str] = []
        self._takes, self._meets = takes, meets
        self.ends: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, info: Any) -> None:
        self.calls.append("init")
        self._meets()

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, info: Any) -> None:
        self._takes()
        self.calls.append("update")

    def finish_weight_update(self, version: str | None = None) -> None:
        self.ends()
        self.calls.append("finish")


class Trainer(TrainerWeightTransferEngine[nccl_engine.NCCLTrainerInitInfo]):
    """vLLM's nccl end but for CUDA: its own `send_weights` over a stand-in of the communicator."""

    init_info_cls = nccl_engine.NCCLTrainerInitInfo
    packed = False
    group: Any = None
    hangs_at: int | None = None
    notices = False
    joins: Any = staticmethod(lambda: None)
    send_weights = nccl_engine.NCCLTrainerWeightTransferEngine.send_weights
    _checked_iter = staticmethod(nccl_engine.NCCLTrainerWeightTransferEngine._checked_iter)

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Trainer:
        engine = cls(client=client, source=source)
        thread = threading.Thread(target=client.init_weight_transfer_engine, args=({},))
        thread.start()
        cls.joins()
        thread.join()
        engine.model_update_group = Group(cls.hangs_at, notices=cls.notices)  # type: ignore[attr-defined]
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor)  # type: ignore[attr-defined]

    def _post_send_sync(self) -> None:
        pass


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    kind = type("Kind", (Trainer,), {})
    monkeypatch.setitem(factory.WeightTransferTrainerFactory._registry, "nccl", lambda: kind)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: nullcontext())
    monkeypatch.setattr(stock, "GRACE_S", 0.2)
    return kind


def meet(driver: SourcePass, client: Client, timeout_s: float = 5.0) -> stock.StockTransport:
    return stock.meet(
        "nccl",
        driver,
        client=client,
        rank=0,
        place=PLACE,
        bucket_bytes=64,
        timeout_s=timeout_s,
        shard_dims=None,
    )


def counted(driver_steps: list[str]) -> SourcePass:
    def stream() -> Iterator[tuple[str, Tensor]]:
        for item in STATE.items():
            driver_steps.append(item[0])
            yield item

    return SourcePass(MANIFEST, stream)


def test_an_update_that_goes_well(trainer: type[Trainer]) -> None:
    steps: list[str] = []
    client = Client()
    transport = meet(counted(steps), client)
    assert transport.send_weights("1") == 4 * 96 and not transport.lost
    assert transport.send_weights("2") == 4 * 96
    assert client.calls == ["init", *["start", "update", "finish"] * 2]
    assert steps == list("abcd") * 2
    client.ends = lambda: time.sleep(0.4)  # re-packing may take longer than the grace
    assert transport.send_weights("3") == 4 * 96
    time.sleep(0.3)  # nor does the limit of an update that has ended expire
    assert not transport.lost and not transport._limit.expired


@pytest.mark.parametrize("how", ["told", "silent", "noticed"])
def test_engines_that_are_gone_do_not_hold_the_sender(trainer: type[Trainer], how: str) -> None:
    """The fleet says that nobody is left, or is late itself, or NCCL notices: the communicator is
    aborted and the pass is followed to its end, as the other ranks do; the update is ended."""
    trainer.hangs_at, trainer.notices = 2, how == "noticed"
    steps: list[str] = []
    client = Client(takes=lambda: time.sleep(1.5 if how == "silent" else 0.1))
    transport = meet(counted(steps), client, timeout_s=0.5)
    begun = time.monotonic()
    assert transport.send_weights("1") == 0 and transport.lost
    assert time.monotonic() - begun < 3
    assert steps == list("abcd"), "the ranks are out of step"
    assert client.calls == ["init", "start", "update", "finish"]


def test_a_failure_of_the_source_is_raised_as_it_is(trainer: type[Trainer]) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(STATE.items()))
        raise RuntimeError("rank 1 lost a peer")

    transport = meet(SourcePass(MANIFEST, stream), Client())
    with pytest.raises(RuntimeError, match="rank 1 lost a peer"):
        transport.send_weights("1")


def test_a_refused_update_is_raised_at_its_end(trainer: type[Trainer]) -> None:
    trainer.hangs_at = 0

    def refuses() -> None:
        raise ValueError("refused")

    steps: list[str] = []
    transport = meet(counted(steps), Client(takes=refuses))
    with pytest.raises(ValueError, match="refused"):
        transport.send_weights("1")
    assert steps == list("abcd")


def test_engines_that_do_not_come(trainer: type[Trainer]) -> None:
    """They were lost while they joined: the trainer's own joining is given up."""
    never = threading.Event()
    trainer.joins = staticmethod(lambda: never.wait(20))
    begun = time.monotonic()
    with pytest.raises(IntroductionFailed):
        meet(make_driver(), Client(meets=lambda: time.sleep(0.1)))
    assert time.monotonic() - begun < 3
    trainer.joins = staticmethod(lambda: _fail(RuntimeError("NCCL error")))
    with pytest.raises(IntroductionFailed, match="NCCL error"):
        meet(make_driver(), Client())
    with pytest.raises(ImportError, match="no nccl"):  # what an engine answers is raised as it is
        meet(make_driver(), Client(meets=lambda: _fail(ImportError("no nccl"))))
    never.set()


def _fail(error: Exception) -> None:
    raise error


def test_a_manifest_that_is_not_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank, when the refit is made: vLLM's receivers do not look."""
    from sfpo_megatron.resharding import refit
    from sfpo_megatron.resharding.transports.tensor_names import ManifestError

    shapes = {name: tuple(t.shape) for name, t in STATE.items()} | {"e": (1,)}
    monkeypatch.setattr(refit, "read_checkpoint_shapes", lambda path: shapes)
    monkeypatch.setattr(refit, "read_hf_config", lambda path: {})
    shape = SimpleNamespace(tied_embeddings=False, num_layers=2, num_mtp_layers=0)
    monkeypatch.setattr(refit, "model_shape", lambda config: shape)
    config: Any = SimpleNamespace(
        refit=SimpleNamespace(transport="nccl"),
        model=SimpleNamespace(path=str(tmp_path), dtype="float32"),
    )
    prepared: list[str] = []
    sharded = SimpleNamespace(prepare=lambda: prepared.append("gathered"))
    source: Any = SimpleNamespace(
        metadata=lambda: MANIFEST, __iter__=lambda: iter(STATE.items()), sharded=sharded
    )
    with pytest.raises(ManifestError, match="e: missing"):
        refit._pass_over(config, source)
    del shapes["e"]
    driver = refit._pass_over(config, source)
    assert driver.manifest == MANIFEST
    driver.restart(fresh=True, verify=False)
    assert prepared == ["gathered"], "vLLM would gather on a stream of its own"
