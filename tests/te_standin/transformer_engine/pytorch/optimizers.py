"""te.pytorch.optimizers: FusedAdam with TE's state contract, and the multi-tensor kernels.

The contract (TE 2.x): the step count is an int in each param group, not a tensor in each state; a
state has exp_avg and exp_avg_sq only; decoupled weight decay with `adam_w_mode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not (adam_w_mode and bias_correction):
            raise NotImplementedError("decoupled weight decay with bias correction only")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(param.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(mean / (1 - beta1**t), root, value=-group["lr"])


class FusedSGD(torch.optim.SGD):
    pass


def multi_tensor_applier(op: Callable[..., Any], flag: Tensor, lists: Any, *args: Any) -> Any:
    return op(2048 * 32, flag, lists, *args)


def multi_tensor_l2norm(
    chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm(), norms if per_tensor else None


def multi_tensor_scale(chunk: int, flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """lists = [sources, destinations]; `flag` is raised where a source is not finite."""
    for source, destination in zip(*lists, strict=True):
        destination.copy_(source * scale)
        if not torch.isfinite(source).all():
            flag.fill_(1)
