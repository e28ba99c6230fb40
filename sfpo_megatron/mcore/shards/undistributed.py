"""Megatron's optimizers without sharding: every data-parallel rank holds all main params.

Megatron saves and loads them as they are, so long as their states are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from sfpo_megatron.mcore.shards.main_params import MainParams


class UndistributedMainParams(MainParams):
    """What the two have in common."""

    @contextmanager
    def saved(self) -> Iterator[None]:
        """`make_states` stands in for Megatron's function, which is for Adam alone."""
        megatrons = self._optimizer.init_state_fn
        self._optimizer.init_state_fn = lambda *_: None
        try:
            yield
        finally:
            self._optimizer.init_state_fn = megatrons


class Float16MainParams(UndistributedMainParams):
    """Float16OptimizerWithFloat16Params: fp32 copies of bf16 or fp16 params."""

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        optimizer = self._optimizer
        for params in (optimizer.float16_groups, optimizer.fp32_from_fp32_groups):
            for group, of_group in zip(optimizer.param_groups, params, strict=True):
                yield from ((param, group) for param in of_group)

    @classmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        return isinstance(optimizer, Float16OptimizerWithFloat16Params)

    def tensors(self) -> Iterator[Tensor]:
        """fp32 masters of bf16 or fp16 params, then params that are fp32 themselves."""
        for group in (
            *self._optimizer.fp32_from_float16_groups,
            *self._optimizer.fp32_from_fp32_groups,
        ):
            yield from group

    def copy_to_model(self) -> None:
        self._optimizer._copy_main_params_to_model_params()


class FP32MainParams(UndistributedMainParams):
    """FP32Optimizer: the model params are their own main params."""

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self._optimizer.param_groups:
            yield from ((param, group) for param in group["params"])

    @classmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        return isinstance(optimizer, FP32Optimizer)

    def tensors(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def copy_to_model(self) -> None:
        pass
