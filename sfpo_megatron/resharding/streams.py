"""Weights as streams: every leader broadcasts its own tensors to all engine workers at once.

A leader is the first rank of a tensor-parallel group: one for each pipeline stage and expert-
parallel rank. It has a communicator of its own with every engine worker, so that stages stream at
the same time and nothing goes through rank 0. In each round of the plan every leader gathers the
shards of its group, packs a bucket and broadcasts it while the next one is gathered. The same over
gloo and NCCL. No vllm here: it runs on every trainer rank.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.host.addresses import own_address
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.resharding.checksums import signed
from sfpo_megatron.resharding.plan import Stream, plan_streams
from sfpo_megatron.resharding.roll_call import BROKEN, members, roll_call
from sfpo_megatron.resharding.seams import Place, ShardedSource
from sfpo_megatron.resharding.stepwise import Stepwise

_ALIGN_BYTES = 64
_POLL_S, _LOOK_S = 0.0005, 0.5
_WATCHDOG_MODE = "TORCH_NCCL_ASYNC_ERROR_HANDLING"

log = logging.getLogger(__name__)


class Work(Protocol):
    """A broadcast that is under way."""

    def is_completed(self) -> bool: ...
    def wait(self) -> bool: ...


class Communicator(Protocol):
    """A process group of torch's, over gloo or NCCL."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> Work: ...
    def abort(self) -> None: ...


def layout(manifest: Sequence[TensorMeta], indices: Sequence[int]) -> tuple[list[int], int]:
    """Offset of each tensor of a bucket, and the bucket's bytes."""
    offsets, end = [], 0
    for index in indices:
        offsets.append(end)
        end += -(-manifest[index].num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return offsets, end


def communicator(
    store: dist.Store, name: str, *, rank: int, size: int, backend: str, timeout_s: float
) -> Communicator:
    """Make a process group between processes of different worlds, in no registry. Rank 0 sends.
    NCCL connects in the first broadcast, which waits without limit: `roll_call` comes before."""
    prefixed = dist.PrefixStore(name, store)
    if backend != "nccl":
        return dist.ProcessGroupGloo(prefixed, rank, size, timedelta(seconds=timeout_s))
    log_unverified("refit over NCCL")
    options = dist.ProcessGroupNCCL.Options()
    # `finish` keeps the time. The group's own watchdog, which would end this process, only reads
    # this variable, when the group is made.
    options._timeout = timedelta(seconds=10 * timeout_s)
    before = os.environ.get(_WATCHDOG_MODE)
    os.environ[_WATCHDOG_MODE] = "0"
    try:
        return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    finally:
        del os.environ[_WATCHDOG_MODE]
        if before is not None:
            os.environ[_WATCHDOG_MODE] = before


def broadcast(group: Communicator, tensor: Tensor) -> Work:
    """Begin to send (rank 0) or receive; `.wait()` ends it."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def finish(work: Work, timeout_s: float, store: dist.Store | None = None) -> None:
    """Wait for the end of a broadcast; RuntimeError where that does not come, or a leader says in
    `store` that it will not. NCCL's own `wait` only makes the stream wait, for ever if a peer is
    dead; gloo notices that in the leader alone, whose abort the others do not feel."""
    deadline = time.monotonic() + timeout_s
    look = time.monotonic() + _LOOK_S
    while not work.is_completed():
        now = time.monotonic()
        if now > deadline:
            raise RuntimeError(f"a broadcast did not end within {timeout_s:g} s")
        if store is not None and now > look:
            if store.check([BROKEN]):
                raise RuntimeError("a leader could not send to every worker")
            look = now + _LOOK_S
        time.sleep(_POLL_S)
    work.wait()


class Streams(Stepwise[Place]):
    """The update of `sfpo_gloo` and `sfpo_nccl_stages` on every trainer rank, attached to the store
    in which leaders and workers meet."""

    def __init__(
        self, source: ShardedSource, *, bucket_bytes: int, backend: str, timeout_s: float
    ) -> None:
        self._source = source
        self._backend, self._timeout_s = backend, timeout_s
        self.manifest: list[TensorMeta] = source.metadata()
        sizes = [meta.num_bytes for meta in self.manifest]
        self.plan: tuple[Stream, ...] = plan_streams(source.leaders, sizes, bucket_bytes)
        super().__init__(num_rounds=len(self.plan[0].rounds))
        self._group: Communicator | None = None
        self._store: dist.Store | None = None
        self._place: Place | None = None
        self._sent: list[tuple[Work, Tensor]] = []
        self._fault: Exception | None = None
        self.checksums: list[int] | None = None

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, for vLLM's `WeightSource`."""
        return self.manifest

    def restart(self, *, fresh: bool, verify: bool) -> None:
        """Begin another update, over new communicators or the last ones."""
        super().restart(fresh=fresh, verify=verify)
        self._fault = self.checksums = None

    def serve(self) -> tuple[str, int]:
        """Open the store in which leaders and workers meet, on the sender; its address and port."""
        address = own_address()
        listener = socket.create_server((address, 0))  # a TCPStore's own would listen everywhere
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout_s),
            master_listen_fd=os.dup(listener.fileno()),
        )
        listener.close()
        return address, port

    def _attach(self, where: Place | None) -> None:
        self._group, self._place = None, self._source.control.broadcast_json(where)

    def _join(self) -> None:
        """Meet every engine worker, which the first round has told to come."""
        if self._group is not None or self._place is None or self._own_stream() is None:
            return
        try:
            if self._store is None:
                self._store = dist.TCPStore(
                    self._place["address"],
                    self._place["port"],
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=self._timeout_s),
                )
            everybody = members([each.leader for each in self.plan], self._place["num_workers"])
            me = f"trainer rank {dist.get_rank()}"
            roll_call(self._store, me, everybody, self._timeout_s)
            self._group = communicator(
                self._store,
                f"leader/{dist.get_rank()}",
                rank=0,
                size=1 + self._place["num_workers"],
                backend=self._backend,
                timeout_s=self._timeout_s,
            )
        except RuntimeError as error:
            self._fail(error)

    def _begin(self) -> None:
        """Finish a gather that is due; checksums of all tensors, where wanted. Collective."""
        self._source.prepare()
        if self._verify:
            sums = [signed(self._source.checksum(i)) for i in range(len(self.manifest))]
            total = self._source.control.sum(torch.tensor(sums, dtype=torch.int64)).tolist()
            self.checksums = total if self._source.control.rank == 0 else None

    def next_round(self) -> None:
        """Gather, pack and begin to send every stream's next bucket. A send that fails is kept for
        `end`: the other ranks of the group go on gathering. Collective."""
        number = self.take_round()
        if number == 0:
            self._join()
        for stream in self.plan:
            indices = stream.rounds[number]
            offsets, num_bytes = layout(self.manifest, indices)
            bucket: Tensor | None = None
            for index, offset in zip(indices, offsets, strict=True):
                tensor = self._source.gather(index)  # None but on the leader
                if tensor is None or self._group is None:
                    continue
                if bucket is None:
                    bucket = self._room(num_bytes, tensor.device)
                meta = self.manifest[index]
                target = bucket[offset : offset + meta.num_bytes]
                target.view(meta.dtype).view(meta.shape).copy_(tensor)
            if bucket is not None:
                self._begin_to_send(bucket)

    def follow_round(self) -> None:
        self.next_round()

    def _room(self, num_bytes: int, device: torch.device) -> Tensor:
        """Memory for a bucket; at most two are held, the other being on its way."""
        while len(self._sent) > 1:
            self._finish_one()
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def _begin_to_send(self, bucket: Tensor) -> None:
        if self._fault is None and self._group is not None:
            try:
                self._sent.append((broadcast(self._group, bucket), bucket))
            except RuntimeError as error:
                self._fail(error)

    def _finish_one(self) -> None:
        work, _ = self._sent.pop(0)
        try:
            finish(work, self._timeout_s if self._fault is None else 0.0)
        except RuntimeError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Nothing more is sent; the workers are told, who would wait for it."""
        if self._fault is not None:
            return
        self._fault = error
        log.warning("a refit broke off: %s", error)
        try:
            if self._store is not None:
                self._store.set(BROKEN, "")
        except RuntimeError:
            pass  # rank 0 has given the store up, which tells them too

    def _end(self) -> bool:
        """Wait for what is still on its way; whether every leader got everything out. Where one did
        not, all communicators are given up: the next update makes new ones. Collective."""
        while self._sent:
            self._finish_one()
        failed = torch.tensor([float(self._fault is not None)])
        whole = self._source.control.max(failed).item() == 0
        if not whole:
            self.abort()
        return whole

    def abort(self) -> None:
        """Give the communicator up."""
        if self._group is not None:
            self._group.abort()
        self._group = self._store = self._place = None

    def _own_stream(self) -> Stream | None:
        rank = dist.get_rank()
        return next((stream for stream in self.plan if stream.leader == rank), None)
