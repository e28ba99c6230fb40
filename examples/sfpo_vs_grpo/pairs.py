"""Paired comparisons of costs: the mean log ratio over seeds, with two intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, mean, stdev

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
    num_lower: int = 0
    """Pairs in which only the first never got there: it counts at its budget, and the pair's ratio
    is a lower bound."""
    num_upper: int = 0
    """Pairs in which only the second never got there: the pair's ratio is an upper bound."""
    num_open: int = 0
    """Pairs in which neither got there: they count as a ratio of 1, and say nothing."""

    @property
    def bounds(self) -> str:
        """Kinds of pairs that are no measured ratios, in words; empty if all are."""
        kinds = {"lower": self.num_lower, "upper": self.num_upper, "open": self.num_open}
        return ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)


@dataclass(kw_only=True, frozen=True, slots=True)
class Difference:
    """Difference by which the first is above the second, in the mean over pairs."""

    value: float
    t_interval: tuple[float, float]
    """Student's t, 95 %."""


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
    interval = _around(logs)
    generator = random.Random(0)
    means = sorted(fmean(generator.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    tail = (1 - _CONFIDENCE) / 2
    low, high = (means[round(share * (_RESAMPLES - 1))] for share in (tail, 1 - tail))
    return PairedRatio(
        value=math.exp(mean(logs)),
        t_interval=(math.exp(interval[0]), math.exp(interval[1])),
        bootstrap=(math.exp(low), math.exp(high)),
        num_lower=sum(a is None and b is not None for a, b in pairs),
        num_upper=sum(a is not None and b is None for a, b in pairs),
        num_open=sum(a is None and b is None for a, b in pairs),
    )


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """First less second, of the same seeds in the same order."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return Difference(value=mean(differences), t_interval=_around(differences))


def quotient(first: PairedRatio, second: PairedRatio) -> tuple[float, tuple[float, float]]:
    """first / second, and its interval: of pairs that have nothing to do with one another, so that
    the widths of both t intervals are added as squares."""
    value = first.value / second.value
    widths = (math.log(one.t_interval[1] / one.value) for one in (first, second))
    factor = math.exp(math.hypot(*widths))
    return value, (value / factor, value * factor)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of their mean, 95 %; without end with one value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def t_quantile(degrees: int) -> float:
    """The t below which 97.5 % of Student's distribution lie."""

    def excess(t: float) -> float:
        inside = degrees / (degrees + t * t)
        return mpmath.betainc(degrees / 2, 0.5, 0, inside, regularized=True) - (1 - _CONFIDENCE)

    return float(mpmath.findroot(excess, (0.1, 100), "bisect", tol=1e-20, maxsteps=100))
