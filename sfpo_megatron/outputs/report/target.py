"""What it took to reach an accuracy, seed by seed, and how arms compare in it.

A seed has reached a target at its first evaluation that is at or above it. A seed that never does
is not left out: its cost is infinite, and the median over seeds is taken, which is finite once more
than half of them have reached it. Intervals are percentile bootstraps over seeds.

The study in examples/sfpo_vs_grpo counts otherwise (docs/results.md says why): its seeds are pairs
and its runs have one budget, neither of which a report can presume.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sfpo_megatron.outputs.report.curves import AXES, Column, Curves

_RESAMPLES = 10_000
_CONFIDENCE = 0.95
_WAY = 0.9


@dataclass(kw_only=True, frozen=True, slots=True)
class Reached:
    """How one seed fared with a target."""

    step: int | None
    """Train step of the first evaluation at or above it, None if there is none."""
    costs: Mapping[str, float]
    """What that took, by `AXES`; infinite where it was not reached."""
    best: float | None
    spent: Mapping[str, float]
    """What the whole run took until its last evaluation."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Ratio:
    """How many times as much the baseline took: above 1, the arm took less."""

    value: float | None
    """None where it cannot be said: half of both arms never got there, or at step 0."""
    low: float | None
    """Bounds of the 95 % interval; None with fewer than two seeds in either arm. Infinite: no bound
    can be given."""
    high: float | None


def chosen_target(arms: Sequence[Sequence[Curves]]) -> float | None:
    """Nine tenths of the way from where the runs began to what half of the seeds of every arm have
    reached, in whole percent: the last tenth is noise. None if that is not above all beginnings, or
    an arm has no evaluation."""
    bests, starts = [], []
    for seeds in arms:
        best = [_best(one) for one in seeds]
        if not seeds or None in best:
            return None
        # The lower median: at least half of the seeds are there.
        values = sorted(value for value in best if value is not None)
        bests.append(values[(len(values) - 1) // 2])
        starts += [one.evals["accuracy"][0] or 0.0 for one in seeds]
    if not bests:
        return None
    start = max(starts)
    target = math.floor(100 * (start + _WAY * (min(bests) - start)) + 1e-9) / 100
    return target if target > start else None


def reached(curves: Curves, target: float) -> Reached:
    """How a run fared with `target`, a share of correct answers."""
    evals = curves.evals
    accuracies = evals.get("accuracy", [])
    rows = [row for row, value in enumerate(accuracies) if value is not None and value >= target]
    row = rows[0] if rows else None
    step = evals["step"][row] if row is not None else None
    return Reached(
        step=int(step) if step is not None else None,
        costs={axis: _cost(evals[axis], row) if accuracies else math.inf for axis in AXES},
        best=_best(curves),
        spent={axis: _cost(evals[axis], -1) if accuracies else 0.0 for axis in AXES},
    )


def ratio(baseline: Sequence[float], arm: Sequence[float]) -> Ratio:
    """The median of `baseline` over that of `arm`, costs of one seed each, infinite where it did
    not get there."""
    value = _quotient(median(baseline), median(arm))
    if len(baseline) < 2 or len(arm) < 2:
        return Ratio(value=value, low=None, high=None)
    generator = random.Random(0)
    drawn = [
        _quotient(
            median(generator.choices(baseline, k=len(baseline))),
            median(generator.choices(arm, k=len(arm))),
        )
        for _ in range(_RESAMPLES)
    ]
    # A resample in which neither arm gets there says nothing: it widens the interval both ways.
    tail = (1 - _CONFIDENCE) / 2
    return Ratio(
        value=value,
        low=_quantile([0.0 if one is None else one for one in drawn], tail),
        high=_quantile([math.inf if one is None else one for one in drawn], 1 - tail),
    )


def _quotient(above: float, below: float) -> float | None:
    if math.isinf(above) and math.isinf(below):
        return None
    if below == 0:
        return None
    return above / below


def _quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values are, one of them: some may be infinite."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def _best(curves: Curves) -> float | None:
    return max((v for v in curves.evals.get("accuracy", []) if v is not None), default=None)


def _cost(column: Column, row: int | None) -> float:
    value = column[row] if row is not None else None
    return math.inf if value is None else value
