"""Tensors compared bit for bit. Torch alone: pytest's own process and the ranks both import it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: -0.0 is not 0.0, and nan is itself."""
    return a.dtype == b.dtype and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def all_same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Equally many on both sides, and each pair equal bit for bit."""
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
