"""te.pytorch.RMSNorm and LayerNorm, with TE's constructor."""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if zero_centered_gamma:
            raise NotImplementedError("zero_centered_gamma")
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
