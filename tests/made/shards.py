"""Shards as a kind of optimizer may hand them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def through_one_buffer(held: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each tensor is drawn into one buffer and written back when the next one is drawn."""
    buffer = torch.empty(max(t.numel() for t in held))
    for tensor in held:
        staged = buffer[: tensor.numel()].view(tensor.shape)
        staged.copy_(tensor)
        yield staged
        tensor.copy_(staged)
