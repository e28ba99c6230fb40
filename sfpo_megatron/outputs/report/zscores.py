"""The entropy gate of a run that has ended or goes on, from the entropies that it has logged.

`sfpo.EntropyGate` decides in the run; here its rule is computed once more, for the picture alone.
A unit test holds the two together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_STD = 1e-9


@dataclass(kw_only=True, frozen=True, slots=True)
class Scores:
    """What the gate saw after each step; None until the window is full."""

    z: list[float | None]
    """Distance of the entropy from the window's mean, in its standard deviations."""
    bound: list[float | None]
    """The entropy (nats) at which z is the threshold."""


def gate_scores(entropies: Sequence[float | None], *, window: int, threshold: float) -> Scores:
    """The scores of one entropy (nats) a step; a step without a finite one shows the gate none."""
    seen: deque[float] = deque(maxlen=window)
    z: list[float | None] = []
    bound: list[float | None] = []
    for entropy in entropies:
        if entropy is not None:
            seen.append(entropy)
        if entropy is None or len(seen) < window:
            z.append(None)
            bound.append(None)
            continue
        mean = math.fsum(seen) / window
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in seen) / window)
        z.append((entropy - mean) / (std + _LEAST_STD))
        bound.append(mean + threshold * std)
    return Scores(z=z, bound=bound)
