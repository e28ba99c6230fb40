"""Figures of an evaluation with n samples a problem: means with their errors, pass@k, majority@n.

Problems are what is sampled from a population, not rollouts: n rollouts of one problem are alike.
So every standard error is over problems, and models are compared by their differences on each one.
numpy, no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_CONFIDENCE = 0.95


@dataclass(kw_only=True, frozen=True, slots=True)
class Sample:
    """One scored rollout, as far as the figures go."""

    correct: bool
    answer: str | None
    """What was taken as its answer, None if there is none: for the majority."""
    num_tokens: int
    truncated: bool


@dataclass(kw_only=True, frozen=True, slots=True)
class Figures:
    """What is reported of one model on one set of problems. Shares are between 0 and 1."""

    num_problems: int
    n: int
    """Samples a problem."""
    accuracy: float
    """avg@n: the mean over problems of the share of correct samples."""
    stderr: float
    """Standard error of `accuracy` over problems; NaN of a single problem."""
    pass_at: Mapping[int, float]
    """k -> probability that at least one of k samples is correct, for k = 1 ... n."""
    majority: float
    """Share of problems whose most frequent answer is correct."""
    mean_tokens: float
    truncated: float
    """Share of rollouts that did not end by themselves."""


def figures(problems: Mapping[str, Sequence[Sample]]) -> Figures:
    """The figures of problem id -> its samples. ValueError if problems have unequal numbers of
    samples, or there is none."""
    sizes = {len(samples) for samples in problems.values()}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f"found problems with {sorted(sizes)} samples, expected one number above 0"
        )
    (n,) = sizes
    means = np.array([sum(s.correct for s in samples) / n for samples in problems.values()])
    flat = [sample for samples in problems.values() for sample in samples]
    return Figures(
        num_problems=len(problems),
        n=n,
        accuracy=float(means.mean()),
        stderr=standard_error(means),
        pass_at={
            k: float(
                np.mean([pass_at(k, n, sum(s.correct for s in one)) for one in problems.values()])
            )
            for k in range(1, n + 1)
        },
        majority=float(np.mean([majority(samples) for samples in problems.values()])),
        mean_tokens=sum(sample.num_tokens for sample in flat) / len(flat),
        truncated=sum(sample.truncated for sample in flat) / len(flat),
    )


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; NaN of fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def pass_at(k: int, n: int, num_correct: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold a correct one: the
    unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - num_correct, k) / math.comb(n, k)


def majority(samples: Sequence[Sample]) -> float:
    """Whether the most frequent answer is correct; among equally frequent ones, the share of them
    that is. Samples without an answer do not vote. One text with two verdicts (`B. Rome` and `B`,
    of which the vote is the letter) is two answers."""
    votes = Counter((one.answer, one.correct) for one in samples if one.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [correct for (_, correct), number in votes.items() if number == most]
    return sum(tied) / len(tied)


@dataclass(kw_only=True, frozen=True, slots=True)
class Difference:
    """How much better one model is than another on the same problems."""

    mean: float
    stderr: float
    low: float
    high: float
    """Bounds of the 95 % interval."""


def difference(
    ours: Mapping[str, Sequence[Sample]], theirs: Mapping[str, Sequence[Sample]]
) -> Difference:
    """`ours` less `theirs` in accuracy, paired by problem; the interval is the percentile bootstrap
    over problems (10,000 resamples, one seed). ValueError if the problems are not the same."""
    if ours.keys() != theirs.keys():
        raise ValueError("found other problems in the two evaluations, expected the same ones")
    gaps = np.array([_share(ours[name]) - _share(theirs[name]) for name in sorted(ours)])
    generator = np.random.default_rng(0)
    # In blocks: 10,000 x 10,000 indices would be 800 MB.
    means = np.concatenate(
        [
            gaps[generator.integers(len(gaps), size=(_RESAMPLES // 100, len(gaps)))].mean(axis=1)
            for _ in range(100)
        ]
    )
    tail = (1 - _CONFIDENCE) / 2
    return Difference(
        mean=float(gaps.mean()),
        stderr=standard_error(gaps),
        low=float(np.quantile(means, tail)),
        high=float(np.quantile(means, 1 - tail)),
    )


def _share(samples: Sequence[Sample]) -> float:
    return sum(sample.correct for sample in samples) / len(samples)
