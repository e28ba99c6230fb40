"""`MainParamShards`: this rank's fp32 main-param shards of whatever optimizer Megatron built.

shards = MainParamShards(optimizer)
for shard in shards.tensors(): ...   # edit in place, no communication
shards.publish()                     # main -> model params, then the param all-gather
shards.params_ready()                # before reading params outside a training forward
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from sfpo_megatron.mcore.shards import distributed, undistributed
from sfpo_megatron.mcore.shards.refused import refuse_unsupported


class MainParamShards:
    """The seam between `sfpo.SlowSnapshot` and Megatron's optimizers.

    ValueError at construction for an optimizer whose main params cannot be edited safely, with the
    setting to change.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizers = (
            list(optimizer.chained_optimizers)
            if isinstance(optimizer, ChainedOptimizer)
            else [optimizer]
        )
        self._tensors: list[Tensor] = []
        for member in self._optimizers:
            refuse_unsupported(member)
            if isinstance(member, DistributedOptimizer):
                self._tensors += distributed.main_params(member)
            elif isinstance(member, Float16OptimizerWithFloat16Params):
                self._tensors += undistributed.float16_main_params(member)
            elif isinstance(member, FP32Optimizer):
                self._tensors += undistributed.fp32_main_params(member)
            else:
                raise ValueError(
                    f"optimizer: found {type(member).__name__}, expected DistributedOptimizer, "
                    "Float16OptimizerWithFloat16Params or FP32Optimizer; SFPO cannot edit its "
                    "main params"
                )

    def tensors(self) -> Sequence[Tensor]:
        """fp32, flat or in the param's shape; the optimizer's own storage, never a copy."""
        return self._tensors

    @torch.no_grad()
    def publish(self) -> None:
        """Copy main params into the model params and all-gather them over data-parallel ranks.

        Collective, in the order of the optimizers, their chunks and their buckets.
        """
        distributed.drain(self._distributed())
        for member in self._optimizers:
            if not isinstance(member, FP32Optimizer):  # there the params are their own masters
                member._copy_main_params_to_model_params()
        distributed.gather(self._distributed())

    @torch.no_grad()
    def params_ready(self) -> None:
        """Finish every param all-gather that is still due: with `overlap_param_gather` it waits
        for the next training forward, and until then live params are 1/DP new and the rest old.
        Collective."""
        distributed.gather_if_due(self._distributed())

    def _distributed(self) -> list[DistributedOptimizer]:
        return [o for o in self._optimizers if isinstance(o, DistributedOptimizer)]
