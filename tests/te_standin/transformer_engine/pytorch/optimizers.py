"""te.pytorch.optimizers: FusedAdam with TE's state contract, and the multi-tensor kernels.

The contract, read in TransformerEngine 2.6 (c90a720), pytorch/optimizers/fused_adam.py and
common/multi_tensor/adam.cu; the same in 2.1 and in 2.20.0.dev0 (d0067d0) but where said:

- `group["step"]` is an int, counted once a step, for groups that have params (since 2.20: for all).
- A state has exp_avg and exp_avg_sq in `exp_avg_dtype`, `exp_avg_sq_dtype`; fp16 ones with a scale
  beside them (`_scales`). It is made by `initialize_state`, at the first step at the latest.
- `master_weights` adds master_param: fp32 in `master_weight_dtype` float32, scaled fp16 in float16,
  or, for bf16 params with `store_param_remainders`, the int16 by which the fp32 main param exceeds
  the bf16 param. That step joins both, computes in fp32, and splits by rounding half up; the other
  one casts fp32 to bf16, half to even.
- An fp32 param has a master_param too, which is a copy from the start and never stepped.
- With `use_decoupled_grad` gradients are `param.decoupled_grad`.
- get_unscaled_state and set_scaled_state speak fp32, but for remainders, which are int16 in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """AdamW; not here: L2 mode, capturable, FP8 params and states."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if amsgrad or capturable or not (adam_w_mode and bias_correction):
            raise NotImplementedError("decoupled weight decay with bias correction only")
        if torch.uint8 in (exp_avg_dtype, exp_avg_sq_dtype):
            raise NotImplementedError("no FP8 states")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.master_weights = master_weights
        self.exp_avg_dtype = exp_avg_dtype
        self.exp_avg_sq_dtype = exp_avg_sq_dtype
        self.master_weight_dtype = master_weight_dtype
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    def _has_remainders(self, param: Tensor, name: str = "master_param") -> bool:
        return (
            self.store_param_remainders and name == "master_param" and param.dtype == torch.bfloat16
        )

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        for name in MOMENTS:
            self._allocate(param, name, self.name_to_dtype_map[name])
        if self.master_weights and store_param_remainders:
            self._allocate(param, "master_param", torch.int16)
        elif self.master_weights:
            self._allocate(param, "master_param", self.master_weight_dtype)
            self.set_scaled_state(param, "master_param", param.detach().clone().float())

    def _allocate(self, param: Tensor, name: str, dtype: torch.dtype) -> None:
        self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        if self.name_to_dtype_map[name] != torch.float32:
            scales = self._scales.setdefault(param, {})
            scales[name] = torch.ones(1, dtype=torch.float32, device=param.device)

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param][name]
        if self.name_to_dtype_map[name] == torch.float32:
            assert state.dtype == (
                torch.int16 if self._has_remainders(param, name) else torch.float32
            )
            return state
        unscaled = state.float()
        if state.dtype == torch.float16:
            unscaled.mul_(self._scales[param][name])
        return unscaled

    def set_scaled_state(self, param: Tensor, name: str, unscaled: Tensor) -> None:
        remainders = self._has_remainders(param, name)
        assert unscaled.dtype == (torch.int16 if remainders else torch.float32)
        dtype = torch.int16 if remainders else self.name_to_dtype_map[name]
        if name not in self.state[param]:
            self._allocate(param, name, dtype)
        state = self.state[param][name]
        if dtype == torch.float16:
            scale = unscaled.abs().max() / (torch.finfo(torch.float16).max / 2)
            self._scales[param][name].copy_(scale)
            unscaled = unscaled * torch.where(scale > 0, scale.reciprocal(), 0.0)
        state.copy_(unscaled)

    def state_dict(self) -> dict[str, Any]:
        """States unscaled, in fp32."""
        found = super().state_dict()
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            if index in found["state"]:
                found["state"][index] = {
                    name: self.get_unscaled_state(param, name) for name in self.state[param]
                }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            if index in state_dict["state"]:
                self.state[param] = {}
                for name, value in state_dict["state"][index].items():
                    kept = value if self._has_remainders(param, name) else value.float()
                    self.set_scaled_state(param, name, kept)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        for param in (p for group in self.param_groups for p in group["params"]):
            param.decoupled_grad = None if set_to_none else param.decoupled_grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                name = "decoupled_grad" if self.use_decoupled_grad else "grad"
                grad = getattr(param, name, None)
                if not self.state[param]:
                    self.initialize_state(param, self._has_remainders(param))
                if grad is not None:
                    self._step_param(param, grad.float(), group)

    def _step_param(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        mean, square = (self.get_unscaled_state(param, name) for name in MOMENTS)
        if param.dtype == torch.float32:
            _adamw(param.data, grad, mean, square, group)
        elif not self.master_weights:
            main = param.float()
            _adamw(main, grad, mean, square, group)
            param.copy_(main)
        elif self._has_remainders(param):
            remainder = self.state[param]["master_param"]
            bits = param.data.view(torch.int16)
            rounded_up = (remainder < 0).int()
            main = ((bits.int() - rounded_up) << 16 | (remainder.int() & 0xFFFF)).view(
                torch.float32
            )
            _adamw(main, grad, mean, square, group)
            remainder.copy_(main.view(torch.int32).to(torch.int16))  # wraps: the low half
            bits.copy_(((main.view(torch.int32) >> 16) + (remainder < 0).int()).to(torch.int16))
        else:
            main = self.get_unscaled_state(param, "master_param")
            _adamw(main, grad, mean, square, group)
            param.copy_(main)
            if self.master_weight_dtype != torch.float32:
                self.set_scaled_state(param, "master_param", main)
        for name, value in zip(MOMENTS, (mean, square), strict=True):
            if self.name_to_dtype_map[name] != torch.float32:
                self.set_scaled_state(param, name, value)


def _adamw(main: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any]) -> None:
    """In place, fp32, in the order of operations of TE's kernel."""
    (beta1, beta2), step = group["betas"], group["step"]
    mean.mul_(beta1).add_((1 - beta1) * grad)
    square.mul_(beta2).add_((1 - beta2) * grad * grad)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    update = (mean / (1 - beta1**step)).div_(root).add_(group["weight_decay"] * main)
    main.sub_(group["lr"] * update)


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
