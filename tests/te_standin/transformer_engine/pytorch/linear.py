"""te.pytorch.Linear and LayerNormLinear: weight [out, in], optional bias, norm fused in front.

Tensor-parallel ranks have rows of W each (`column`) or columns of it (`row`), and exchange what
TE's do: tokens are gathered before a product, or the result is summed after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.exchange import gathered, own_sum, reduce_output, summed
from transformer_engine.pytorch.norm import rms_norm


class _Product(torch.autograd.Function):
    """x W^T. `group`: tensor-parallel ranks with other rows of W and the same x or, with
    `split`, other tokens of it, which are gathered once for each direction and not kept.

    `fused`: the backward adds the weight's gradient to `weight.main_grad`, in its dtype, or puts it
    there in a first microbatch; the gradient that autograd gets is not to be used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        fused: bool,
        is_first_microbatch: bool | None,
        group: dist.ProcessGroup | None,
        split: bool,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.fused, ctx.is_first_microbatch = weight, fused, is_first_microbatch
        ctx.group, ctx.split = group, split
        return F.linear(gathered(x, group) if group and split else x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,), weight, group, grad = ctx.saved_tensors, ctx.weight, ctx.group, grads[0]
        to_x = grad @ weight
        if group is not None:
            to_x = own_sum(to_x, group) if ctx.split else summed(to_x, group)
            x = gathered(x, group) if ctx.split else x
        kind = weight.main_grad.dtype if ctx.fused else weight.dtype
        found = grad.flatten(0, -2).to(kind).t() @ x.flatten(0, -2).to(kind)
        if ctx.fused:
            if ctx.is_first_microbatch:
                weight.main_grad.copy_(found)
            else:
                weight.main_grad.add_(found)
            weight.grad_added_to_main_grad = True
            found = torch.full_like(weight, torch.nan)
        return to_x, found, None, None, None, None


def _multiply(module: Any, x: Tensor, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
    group = module.tp_group if module.parallel_mode == "column" else None
    split = module.sequence_parallel
    fused = module.fuse_wgrad_accumulation
    product: Tensor = _Product.apply(x, weight, fused, is_first_microbatch, group, split)
    return product


def _mark(param: Tensor, dim: int) -> None:
    """Say that other ranks have other parts: TE says so of every weight, whole ones too."""
    for name, value in (("tensor_model_parallel", True), ("partition_dim", dim)):
        setattr(param, name, value)
    param.partition_stride = 1  # type: ignore[attr-defined]


class Linear(torch.nn.Module):
    """y = x W^T + b. With `return_bias`, b is handed back instead of added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str | torch.device = "cpu",
        rng_tracker_name: str | None = None,
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        self.tp_group = tp_group if tp_size > 1 else None
        self.sequence_parallel = sequence_parallel and tp_size > 1
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        elif tp_size != 1:
            raise NotImplementedError(f"parallel_mode {parallel_mode!r} at TP{tp_size}")
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = torch.nn.Parameter(
            torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        )
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if init_method is not None:
            init_method(self.weight)
        if bias:
            self.bias = torch.nn.Parameter(
                torch.zeros(out_features, dtype=params_dtype, device=device)
            )
            if parallel_mode == "column":
                _mark(self.bias, 0)
            elif parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        y = _multiply(self, x, self.weight, is_first_microbatch)
        if self.tp_group is not None and self.parallel_mode == "row":
            y = reduce_output(y, self.tp_group, scatter=self.sequence_parallel)
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class LayerNormLinear(Linear):
    """Linear(norm(x)); the norm's weight is a parameter of this module, `layer_norm_weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        params_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **linear: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device, **linear
        )
        if normalization not in ("LayerNorm", "RMSNorm") or zero_centered_gamma:
            raise NotImplementedError(f"normalization {normalization!r}, zero-centred or not")
        self.eps, self.normalization = eps, normalization
        of_linear = dict(self._parameters)
        self._parameters.clear()  # TE registers the norm's first: the order of DDP's buffers
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(
                torch.zeros(in_features, dtype=params_dtype, device=device)
            )
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self._parameters.update(of_linear)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        if self.normalization == "RMSNorm":
            x = rms_norm(x, self.layer_norm_weight, self.eps)
        else:
            shape = (self.in_features,)
            x = F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(x, is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """The experts' linear: `num_gemms` weights (weight0, weight1, ...), each for its own rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str | torch.device = "cpu",
        rng_tracker_name: str | None = None,
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        if tp_size != 1 or bias or return_bias:  # Megatron exchanges experts' tokens itself
            raise NotImplementedError("the stand-in's GroupedLinear: TP1, no bias")
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.tp_group, self.sequence_parallel, self.parallel_mode = None, False, parallel_mode
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))
            _mark(getattr(self, f"weight{i}"), 1 if parallel_mode == "row" else 0)
            if init_method is not None:
                init_method(weight)

    def forward(
        self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        parts = zip(x.split(m_splits), range(self.num_gemms), strict=True)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat(
            [_multiply(self, part, weights[i], is_first_microbatch) for part, i in parts]
        )
