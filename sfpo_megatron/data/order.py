"""The order of an epoch: a shuffle that (run seed, epoch) alone decides, with shares by weight.

Of the sources with the greatest weight an epoch has every prompt; of one with half of that weight
it has half of the prompts, rounded, and the next epoch has those that follow: each comes once
before any comes again. So no epoch has a prompt twice, and each has its exact share of a source.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from sfpo_megatron.data.reasoning_gym import derived_seed


def shares_of(weights: Sequence[float]) -> list[float]:
    """How much of each source an epoch has, 1 for all."""
    greatest = max(weights)
    return [weight / greatest for weight in weights]


def epoch_order(
    seed: int, epoch: int, counts: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Indices of the prompts of an epoch, in their order; `counts`: prompts of each source, which
    stand one source after the other."""
    order: list[int] = []
    begin = 0
    for number, (count, share) in enumerate(zip(counts, shares_of(weights), strict=True)):
        drawn = range(count) if share == 1 else _part(seed, epoch, number, count, share)
        order += [begin + index for index in drawn]
        begin += count
    random.Random(derived_seed("order", seed, epoch)).shuffle(order)
    return order


def epoch_length(counts: Sequence[int], weights: Sequence[float]) -> int:
    """How many prompts an epoch has."""
    pairs = zip(counts, shares_of(weights), strict=True)
    return sum(count if share == 1 else _size(count, share) for count, share in pairs)


def _size(count: int, share: float) -> int:
    return min(count, max(1, int(count * share + 0.5))) if count else 0


def _part(seed: int, epoch: int, number: int, count: int, share: float) -> list[int]:
    """The prompts of one source in one epoch: the next ones of a shuffle that has no end."""
    size = _size(count, share)
    indices = list(range(count))
    random.Random(derived_seed("weight", seed, number)).shuffle(indices)
    return [indices[place % count] for place in range(epoch * size, (epoch + 1) * size)]
