"""The control plane: a gloo group of its own for messages and batches between trainer ranks.

Ranks wait here for rank 0 while rollouts are generated, so that no NCCL operation is outstanding
(its watchdog would end the waiting ranks) and the wait has a limit of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.host.peers import PeerLostError

T = TypeVar("T")


class ControlGroup:
    """All trainer ranks over gloo. Every method is collective: each rank calls it, in order."""

    def __init__(self, timeout_s: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def broadcast(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's named tensors on every rank (CPU); the others pass None."""
        if self.size == 1:
            assert tensors is not None
            return dict(tensors)
        header = None
        if tensors is not None:
            header = json.dumps(
                [
                    [name, str(t.dtype).removeprefix("torch."), list(t.shape)]
                    for name, t in tensors.items()
                ]
            )
        received = {}
        for name, dtype, shape in json.loads(self._broadcast_text(header)):
            buffer = (
                tensors[name].contiguous()
                if tensors is not None
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            # gloo has no bool; a byte view is the same bits.
            self._broadcast(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer)
            received[name] = buffer
        return received

    def broadcast_json(self, value: T | None = None) -> T:
        """Rank 0's JSON value on every rank; what the others pass is ignored."""
        return json.loads(self._broadcast_text(json.dumps(value) if self.rank == 0 else None))

    def all_gather_json(self, value: T) -> list[T]:
        """Every rank's value (numbers, text and containers of them), by rank."""
        gathered = [value] * self.size
        self._guard(lambda: dist.all_gather_object(gathered, value, group=self._group))
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Element sums over all ranks, in `values`' own dtype."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Element maxima over all ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def agree(self, **values: int) -> None:
        """Raise on every rank if any value differs between ranks: they are out of step."""
        mine = torch.tensor(list(values.values()), dtype=torch.int64)
        both = self.max(torch.cat([mine, -mine]))
        high, low = both.chunk(2)
        for name, top, bottom in zip(values, high.tolist(), (-low).tolist(), strict=True):
            if top != bottom:
                raise RuntimeError(
                    f"ranks are out of step: {name} is {bottom} on one rank and {top} on another "
                    f"(rank {self.rank} has {values[name]})"
                )

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def _all_reduce(self, values: Tensor, op: dist.ReduceOp) -> Tensor:
        result = values.detach().cpu().clone()
        self._guard(lambda: dist.all_reduce(result, op=op, group=self._group))
        return result

    def _broadcast(self, buffer: Tensor) -> None:
        self._guard(lambda: dist.broadcast(buffer, src=0, group=self._group))

    def _broadcast_text(self, text: str | None) -> str:
        length = torch.tensor([len(text.encode()) if text is not None else 0])
        self._broadcast(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        if text is not None:
            data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self._broadcast(data)
        return bytes(data.tolist()).decode()

    def _guard(self, collective: Callable[[], dist.Work | None]) -> None:
        if self.size == 1:
            return
        try:
            collective()
        except RuntimeError as error:  # gloo reports a lost peer and a timeout alike
            raise PeerLostError(f"rank {self.rank} lost a peer or timed out: {error}") from error
