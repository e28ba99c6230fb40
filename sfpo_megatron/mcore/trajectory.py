"""`MainParamTrajectory`: Megatron's main params for `snapshots.predicted`.

What has to be the same on every layout is taken over whole weights: which shards, on which ranks,
are of one weight is found by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sfpo_megatron.mcore.model import named_params
from sfpo_megatron.mcore.setup import Policy


class MainParamTrajectory:
    """A policy's shards, with the statistics of their weights. Collective to make."""

    def __init__(self, policy: Policy) -> None:
        self._shards, self._control = policy.shards, policy.control
        names = {id(param): name for name, param in named_params(policy.chunks)}
        mine = [names[id(param)] for param, _ in self._shards.owners()]
        everyone = self._control.all_gather_json(mine)
        if not all(everyone):  # such a rank could not count the steps that were made
            raise ValueError(
                "sfpo.trajectory: found predicted, and ranks without main params, expected some on "
                "every rank; take fewer data-parallel ranks, or set sfpo.trajectory: real"
            )
        everywhere = {name for of_rank in everyone for name in of_rank}
        slots = {name: slot for slot, name in enumerate(sorted(everywhere))}
        self._slots = torch.tensor([slots[name] for name in mine], dtype=torch.int64)
        self._num_weights = len(slots)
        sizes = [shard.numel() for shard in self._shards.tensors()]
        self._numels = self._totals(torch.tensor(sizes, dtype=torch.float64))

    def tensors(self) -> Iterator[Tensor]:
        return self._shards.tensors()

    def publish(self) -> None:
        self._shards.publish()

    def before_step(self, callback: Callable[[], None]) -> None:
        self._shards.before_step(callback)

    def decays(self) -> list[float]:
        return self._shards.decays()

    def means(self, sums: Tensor) -> Tensor:
        """Ranks that hold a weight twice (tensor-parallel copies, tied embeddings, optimizers
        without sharding) add the same to its sum and to its elements."""
        return (self._totals(sums) / self._numels)[self._slots]

    def _totals(self, values: Tensor) -> Tensor:
        """[weights]: of each weight, the sum of its shards' values over all ranks."""
        totals = torch.zeros(self._num_weights, dtype=torch.float64)
        return self._control.sum(totals.index_add_(0, self._slots, values))
