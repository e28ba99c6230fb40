"""Sums and means over the sequences of a pack, and their way back onto its tokens.

A sequence is never split over microbatches (batching.py), so these need no other rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """The S sequences of one pack; only tokens under the loss mask count: of a response, those that
    the model generated."""

    def __init__(self, cu_seqlens: Tensor, loss_mask: Tensor) -> None:
        """cu_seqlens: [S + 1] int32, loss_mask: [T] bool."""
        self._mask = loss_mask
        self._num = cu_seqlens.numel() - 1
        positions = torch.arange(
            loss_mask.numel(), dtype=cu_seqlens.dtype, device=cu_seqlens.device
        )
        self.ids = torch.searchsorted(cu_seqlens, positions, right=True) - 1  # [T] int64
        """Which sequence each token is of."""
        self.num_tokens = self.sum(loss_mask.float())  # [S]
        """Tokens under the mask of each; 0 for padding."""

    def sum(self, values: Tensor) -> Tensor:
        """[T] -> [S]"""
        masked = torch.where(self._mask, values, 0.0)
        return masked.new_zeros(self._num).index_add(0, self.ids, masked)

    def mean(self, values: Tensor) -> Tensor:
        """[T] -> [S]; 0 for a sequence without a token under the mask."""
        return self.sum(values) / self.num_tokens.clamp(min=1)

    def on_tokens(self, values: Tensor) -> Tensor:
        """[S] -> [T]"""
        return values[self.ids]
