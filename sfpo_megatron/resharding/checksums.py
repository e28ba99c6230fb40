"""Checksums that add up over shards: computed on Megatron's pieces and inside the engine.

    checksum(W) = sum over i of  f(i) * bits(W_i)   mod 2^64,   i the flat index in the full tensor

f(i) is odd and looks random, so one changed element always changes the sum, two that are swapped
all but surely do, and the sums of the pieces of a tensor add up to the tensor's. Computed in signed
64-bit integers, whose overflow torch wraps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ELEMENTS_AT_A_TIME = 1 << 20  # temporaries of 8 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ChecksumError(ValueError):
    """A parameter arrived in an engine with other bits than it left the trainer with."""


@torch.no_grad()
def checksum(
    region: Tensor, full: Sequence[int] | None = None, *, dim: int = 0, start: int = 0
) -> int:
    """Checksum of `region`: the rows from `start` on along `dim` of a tensor of shape `full` (by
    default all of it)."""
    full = list(region.shape) if full is None else list(full)
    if not region.numel():
        return 0
    # View as [outer, rows, inner]: flat index = (outer * full_rows + row) * inner + column.
    outer, inner = math.prod(full[:dim]), math.prod(full[dim + 1 :])
    full_rows = full[dim] if full else 1
    bits = region.contiguous().view(_BITS[region.element_size()]).reshape(outer, -1, inner)
    rows_at_a_time = max(1, _ELEMENTS_AT_A_TIME // (outer * inner))
    columns = torch.arange(inner, device=region.device)
    outers = torch.arange(outer, device=region.device)[:, None, None] * (full_rows * inner)
    total = torch.zeros((), dtype=torch.int64, device=region.device)
    for first in range(0, bits.shape[1], rows_at_a_time):
        block = bits[:, first : first + rows_at_a_time].to(torch.int64)
        rows = torch.arange(block.shape[1], device=region.device) + (start + first)
        index = outers + rows[:, None] * inner + columns
        total += block.mul_(_mix(index)).sum()
    return int(total)


def signed(number: int) -> int:
    """`number` mod 2^64 as a signed 64-bit integer, which travels in tensors and messages."""
    number %= 1 << 64
    return number - (1 << 64) if number >= 1 << 63 else number


def _mix(index: Tensor) -> Tensor:
    """Apply splitmix64's first steps in place, and make the result odd."""
    index.add_(1).mul_(-7046029254386353131)  # 0x9E3779B97F4A7C15
    index.bitwise_xor_(index >> 30).mul_(-4658895280553007687)  # 0xBF58476D1CE4E5B9
    return index.bitwise_xor_(index >> 27).bitwise_or_(1)


def check(name: str, tensor: Tensor, expected: int) -> None:
    """Raise `ChecksumError` naming the parameter unless its checksum is `expected`."""
    found = checksum(tensor)
    if found != expected:
        raise ChecksumError(
            f"{name}: found checksum {found:#x} in the engine, expected {expected:#x} as on the "
            "trainer's shards; its values changed on the way"
        )
