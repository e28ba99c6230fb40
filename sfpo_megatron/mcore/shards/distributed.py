"""The DistributedOptimizer: fp32 shards that Megatron itself keeps beside the model params."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sfpo_megatron.mcore.shards.main_params import ShardedMainParams


class DistributedMainParams(ShardedMainParams):
    """Flat fp32 shards of bf16 or fp16 params; of fp32 params, views of the model params' own
    storage."""

    @classmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        return isinstance(optimizer, DistributedOptimizer)

    def tensors(self) -> Iterator[Tensor]:
        for group in (
            *self._optimizer.shard_fp32_from_float16_groups,
            *self._optimizer.shard_fp32_groups,
        ):
            yield from group

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        owner_of = self._owner_of()
        return (owner_of[id(shard)] for shard in self.tensors())

    def copy_to_model(self) -> None:
        self._optimizer._copy_main_params_to_model_params()

    def state_of(self, model_param: Tensor) -> dict[str, Tensor]:
        shard = self._stepped(model_param)
        state = self._optimizer.optimizer.state[shard]
        return {"param": shard, **{name: state[name] for name in self._moments()}}

    @torch.no_grad()
    def put_state(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        shard = self._stepped(model_param)
        shard.copy_(tensors["param"])
        for name in self._moments():
            self._optimizer.optimizer.state[shard][name].copy_(tensors[name])
