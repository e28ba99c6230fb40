"""te.pytorch.RMSNorm and LayerNorm, with TE's constructor; RMSNorm keeps for its backward what TE's
kernel keeps: the input and 1 / rms of each row in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w; arithmetic in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grads[0].float()
        inner = grad * weight.float()
        to_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        to_weight = (grad * normed).flatten(0, -2).sum(0)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., h] -> [..., h]."""
    result: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)  # as TE: no view stays alive
    return result


def _size(normalized_shape: int | None, hidden_size: int | None) -> int:
    """TE takes both names: Megatron-Core 0.16 uses one, 0.19 the other."""
    (size,) = (s for s in (normalized_shape, hidden_size) if s is not None)
    return size


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        *,
        hidden_size: int | None = None,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        super().__init__(
            _size(normalized_shape, hidden_size), eps=eps, dtype=params_dtype, device=device
        )
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        *,
        hidden_size: int | None = None,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        super().__init__(
            _size(normalized_shape, hidden_size), eps=eps, dtype=params_dtype, device=device
        )
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
