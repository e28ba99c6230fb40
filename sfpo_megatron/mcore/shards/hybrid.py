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
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sfpo_megatron.mcore.shards import steppers
from sfpo_megatron.mcore.shards.main_params import ShardedMainParams


class HybridMainParams(ShardedMainParams):
    """DistributedOptimizer around a HybridDeviceOptimizer: the inner params, fp32, on the host or
    the device. ValueError if one is not fp32."""

    @classmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        distributed = isinstance(optimizer, DistributedOptimizer)
        return distributed and isinstance(optimizer.optimizer, HybridDeviceOptimizer)

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        super().__init__(optimizer)
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
        inner_of = self._hybrid.param_to_inner_param  # read again: loading a state rebuilds it
        for group in self._hybrid.param_groups:
            for outer in group["params"]:
                yield inner_of[outer]

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        owner_of = self._owner_of()
        for group in self._hybrid.param_groups:
            yield from (owner_of[id(outer)] for outer in group["params"])

    def copy_to_model(self) -> None:
        for outer, inner in self._hybrid.param_to_inner_param.items():
            if inner is not outer:
                # Not `non_blocking`: the next CPU step would change the host copy under it.
                outer.data.copy_(inner.data)
        self._optimizer._copy_main_params_to_model_params()

    @torch.no_grad()
    def take_from_model(self) -> None:
        """Megatron's `reload_model_params` reaches neither outer fp32 shards nor, of those, the
        inner copies: its first step would write the weights from before the load over all."""
        for model_param in self._optimizer.model_param_group_index_map:
            span = self._optimizer._get_model_param_range_map(model_param)["param"]
            outer = self._stepped(model_param)
            outer.copy_(model_param.view(-1)[span.start : span.end])
            self._hybrid.param_to_inner_param[outer].copy_(outer)

    def state_of(self, model_param: Tensor) -> dict[str, Tensor]:
        hybrid, outer = self._hybrid, self._stepped(model_param)
        moments = {name: hybrid.state[outer][name] for name in self._moments()}
        return {"param": hybrid.param_to_inner_param[outer], **moments}

    @torch.no_grad()
    def put_state(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        hybrid, outer = self._hybrid, self._stepped(model_param)
        inner = hybrid.param_to_inner_param[outer]
        inner.copy_(tensors["param"])
        if inner is not outer:
            outer.copy_(inner)
        for name in self._moments():
            hybrid.state[outer][name].copy_(tensors[name])

    def make_states(self) -> None:
        super().make_states()
        self._hybrid._sync_sub_optimizers_state_to_hdo()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Its load_state_dict fails on params that have no fp32 copy, and does not load the inner
        copies: left out, for `put_state` writes both in place."""
        hybrid = self._hybrid
        hybrid.load_state_dict = lambda state: None
        hybrid._sync_hdo_state_to_sub_optimizers = lambda: None
        try:
            with super().saved():
                yield
        finally:
            del hybrid.load_state_dict
            del hybrid._sync_hdo_state_to_sub_optimizers

    def after_load(self) -> None:
        """The kernel on the device, which may count in its param groups, takes the host's count."""
        counts = steppers.unshare_step_counts(self._hybrid)
        if counts:
            steppers.set_group_counts(self._hybrid, counts[0])
