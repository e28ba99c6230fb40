"""What the ranks of a group exchange: of tokens, whose dimension is the first, gathers and sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, ...] of every rank, one after another."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def own_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of the sum over ranks (a reduce-scatter, which gloo has not)."""
    return summed(x, group).chunk(group.size())[group.rank()].clone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return own_sum(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _OwnSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return own_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gathered(grads[0], ctx.group), None


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gathered`, for autograd: the gradient is this rank's part of the sum over ranks."""
    whole: Tensor = _Gather.apply(x, group)
    return whole


def reduce_output(y: Tensor, group: dist.ProcessGroup, *, scatter: bool) -> Tensor:
    """The sum over ranks of a row-parallel layer's output, for autograd; with `scatter` this rank's
    tokens of it."""
    total: Tensor = (_OwnSum if scatter else _Sum).apply(y, group)
    return total
