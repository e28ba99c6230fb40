"""What a run has cost until it was at the threshold, all of it where it never was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from saved import Outcome


def _until(run: Outcome, threshold: float) -> float:
    """Train steps until the threshold, all of them where it was not reached."""
    rollouts = run.reached(threshold)
    return len(run.train) if rollouts is None else rollouts / rollouts_a_step(run)


def rollouts_a_step(run: Outcome) -> int:
    return run.train[0]["rollouts"]


def warm(run: Outcome) -> Sequence[Mapping[str, Any]]:
    """Measured train steps after the first, in which torch and the engine still set things up: it
    takes several times as long. Of a run that ended there, the first."""
    return run.measured[1:] or run.measured


def seconds_of(run: Outcome, threshold: float, *, budget: float) -> float:
    """Seconds to the threshold as the ratios count them: of `budget` rollouts where it was not
    reached."""
    rollouts = run.reached(threshold)
    return (budget if rollouts is None else rollouts) * a_rollout(run)


def seconds(run: Outcome, threshold: float) -> float:
    """Seconds of the train steps until the threshold, the first at the price of the others."""
    return _until(run, threshold) * mean(line["step_s"] for line in warm(run))


def a_rollout(run: Outcome) -> float:
    """Seconds of a train step for each of its rollouts."""
    return mean(line["step_s"] for line in warm(run)) / rollouts_a_step(run)


def passes(run: Outcome, threshold: float) -> float:
    """Rollouts that passes over their batches were made with until the threshold, once a pass: a
    quarter of a batch costs a quarter."""
    a_step = rollouts_a_step(run)
    return _until(run, threshold) * a_step * mean(line["passes"] for line in run.measured)


def tokens(run: Outcome, threshold: float) -> float:
    """Generated for training until the threshold."""
    a_step = rollouts_a_step(run)
    return _until(run, threshold) * a_step * mean(line["tokens"] for line in run.measured)
