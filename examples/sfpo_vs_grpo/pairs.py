"""Paired comparisons of costs: the mean log ratio over seeds, with two intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import mpmath

_CONFIDENCE = 0.95
_RESAMPLES = 10_000


@dataclass(kw_only=True, frozen=True, slots=True)
class PairedRatio:
    """How many times as much the first costs as the second: the geometric mean over pairs."""

    value: float
    t_interval: tuple[float, float]
    """Student's t on the log ratios, 95 %; (0, inf) with one pair."""
    bootstrap: tuple[float, float]
    """Percentiles of 10,000 resamples of the pairs."""
    num_bounds: int
    """Pairs in which one of the two never got there and counts at its budget: the ratio is a lower
    bound where it is the first, an upper one where it is the second."""


def paired_ratio(
    first: Sequence[float | None], second: Sequence[float | None], *, budget: float
) -> PairedRatio:
    """Costs of the same seeds in the same order; None counts as `budget`. ValueError for a cost of
    nothing, of which there is no ratio."""
    pairs = list(zip(first, second, strict=True))
    for number, pair in enumerate(pairs):
        if any(cost is not None and cost <= 0 for cost in pair):
            raise ValueError(
                f"pair {number}: found the costs {pair}, expected some above 0; a run that is at "
                "its threshold before it trains has none: raise `threshold` in study.toml"
            )
    logs = [math.log((budget if a is None else a) / (budget if b is None else b)) for a, b in pairs]
    generator = random.Random(0)
    means = sorted(mean(generator.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    tail = (1 - _CONFIDENCE) / 2
    low, high = (means[round(share * (_RESAMPLES - 1))] for share in (tail, 1 - tail))
    return PairedRatio(
        value=math.exp(mean(logs)),
        t_interval=_t_interval(logs),
        bootstrap=(math.exp(low), math.exp(high)),
        num_bounds=sum((a is None) != (b is None) for a, b in pairs),
    )


def _t_interval(logs: Sequence[float]) -> tuple[float, float]:
    if len(logs) < 2:
        return 0.0, math.inf
    half = t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs) - half), math.exp(mean(logs) + half)


def t_quantile(degrees: int) -> float:
    """The t below which 97.5 % of Student's distribution lie."""

    def excess(t: float) -> float:
        inside = degrees / (degrees + t * t)
        return mpmath.betainc(degrees / 2, 0.5, 0, inside, regularized=True) - (1 - _CONFIDENCE)

    return float(mpmath.findroot(excess, (0.1, 100), "bisect", tol=1e-20, maxsteps=100))
