"""What the entropy gate of a run saw, from the entropies that the run has logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfpo_megatron.gate import EntropyGate


@dataclass(kw_only=True, frozen=True, slots=True)
class Scores:
    """What the gate saw after each step; None until the window is full."""

    z: list[float | None]
    """Distance of the entropy from the window's mean, in its standard deviations."""
    bound: list[float | None]
    """The entropy (nats) that crosses a threshold above the mean."""
    low_bound: list[float | None]
    """That below it, of a two-sided gate."""


def gate_scores(entropies: Sequence[float | None], gate: EntropyGate) -> Scores:
    """Show a new gate one entropy (nats) a step; a step without a finite one shows it none."""
    z: list[float | None] = []
    bound: list[float | None] = []
    low_bound: list[float | None] = []
    for entropy in entropies:
        if entropy is not None:
            gate.observe(entropy)
        z.append(None if entropy is None else gate.zscore)
        bound.append(None if entropy is None else gate.bound)
        low_bound.append(None if entropy is None else gate.low_bound)
    return Scores(z=z, bound=bound, low_bound=low_bound)
