"""Optimizers without sharding: every data-parallel rank holds all main params, so no gather."""

from __future__ import annotations

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor


def float16_main_params(optimizer: Float16OptimizerWithFloat16Params) -> list[Tensor]:
    """fp32 masters of bf16 params, then params that are fp32 themselves."""
    groups = [*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups]
    return [param for group in groups for param in group]


def fp32_main_params(optimizer: FP32Optimizer) -> list[Tensor]:
    """The model params themselves."""
    return [param for group in optimizer.param_groups for param in group["params"]]
