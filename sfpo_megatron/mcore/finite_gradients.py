"""A step with non-finite gradients is skipped by an FP32Optimizer too.

Megatron's other optimizers have a grad scaler, whose check skips such a step on every rank. An
FP32Optimizer (fp32 params without the distributed optimizer) has none: it would write NaN into the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer


def skip_non_finite(optimizer: MegatronOptimizer) -> None:
    """Let each FP32Optimizer in `optimizer` look at its gradients before a step."""
    chained = isinstance(optimizer, ChainedOptimizer)
    for member in optimizer.chained_optimizers if chained else [optimizer]:
        if isinstance(member, FP32Optimizer):
            member.prepare_grads = partial(_prepare_grads, member, member.prepare_grads)


@torch.no_grad()
def _prepare_grads(member: FP32Optimizer, megatrons: Callable[[], bool]) -> bool:
    """Megatron's `prepare_grads`, then whether a gradient is non-finite on any rank; by the same
    kernel and over the same ranks as in MixedPrecisionOptimizer. Collective."""
    found = megatrons()
    one = member.get_loss_scale()
    flag = torch.zeros_like(one)
    if grads := [param.grad for param in member.get_parameters() if param.grad is not None]:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, one)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=member.get_grad_stats_parallel_group())
    return found or flag.item() > 0
