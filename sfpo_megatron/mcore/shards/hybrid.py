"""`optimizer_cpu_offload`: the main params that Megatron's HybridDeviceOptimizer steps.

Of each param that the DistributedOptimizer gives it (here *outer*: the fp32 shard, or with the
precision-aware optimizer the bf16 shard itself) it may hold an *inner* fp32 copy, in host memory
where offloaded. Adam steps the inner one, and a step post-hook copies it over the outer one
(hybrid_optimizer.py, _register_param_copy_back_gpu_hook): the next optimizer step would undo an
edit of outer params alone.

Private names of Megatron-Core used here are held by tests/dist/test_private_names.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class HybridMainParams:
    """DistributedOptimizer around a HybridDeviceOptimizer: the inner params, fp32, on the host or
    the device. ValueError if one is not fp32."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        for main_param in self.tensors():
            if main_param.dtype != torch.float32:
                raise ValueError(
                    "megatron.optimizer.optimizer_cpu_offload: found main params of "
                    f"{main_param.dtype}, expected torch.float32; SFPO needs "
                    "HybridDeviceOptimizer's param_update_in_fp32"
                )

    @property
    def _hybrid(self) -> HybridDeviceOptimizer:
        return self._optimizer.optimizer

    def tensors(self) -> Iterator[Tensor]:
        inner_of = self._hybrid.param_to_inner_param  # read anew: loading a state rebuilds it
        for group in self._hybrid.param_groups:
            for outer in group["params"]:
                yield inner_of[outer]

    def copy_to_model(self) -> None:
        for outer, inner in self._hybrid.param_to_inner_param.items():
            if inner is not outer:
                # Not `non_blocking`: the next CPU step would change the host copy under it.
                outer.data.copy_(inner.data)
        self._optimizer._copy_main_params_to_model_params()
