"""What a report shows, worked out once: the tables are made from it, and the page's charts draw the
JSON of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfpo_megatron.outputs.report.arms import Arm, Band, drift_profile, over_seeds
from sfpo_megatron.outputs.report.curves import (
    AXES,
    PHASES,
    SMOOTHING,
    Column,
    Curves,
    curves_of,
    finite,
    mean,
    running_mean,
    thinned,
    zscore_threshold,
)
from sfpo_megatron.outputs.report.reading import Run, setting
from sfpo_megatron.outputs.report.samples import shown_samples
from sfpo_megatron.outputs.report.target import Ratio, Reached, chosen_target, ratio, reached

_MOST_ROWS = 5_000
"""Rows of all runs together; of longer runs each row is a mean of several steps."""
_DIGITS, _AXIS_DIGITS = 4, 7
_SMOOTH_BANDS = ("reward_mean", "entropy", "ppo_kl", "response_tokens_mean")
_EVAL_BANDS = ("accuracy", "reward_mean")


@dataclass(kw_only=True, frozen=True, slots=True)
class Target:
    """An accuracy, and what it took every seed and arm to get there."""

    accuracy: float
    is_chosen: bool
    """Whether the report chose it, not the user."""
    baseline: int
    """The arm that the others are compared with."""
    seeds: tuple[Reached, ...]
    """One a run."""
    ratios: tuple[Mapping[str, Ratio], ...]
    """One an arm, by `AXES`."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Document:
    """Everything that the page says."""

    runs: tuple[Run, ...]
    curves: tuple[Curves, ...]
    """One a run, every step of it."""
    arms: tuple[Arm, ...]
    target: Target | None


def document_of(runs: Sequence[Run], arms: Sequence[Arm], target: float | None) -> Document:
    """Work out a report of `runs`; `target` as the user gave it, None to choose one."""
    curves = [curves_of(run) for run in runs]
    return Document(
        runs=tuple(runs),
        curves=tuple(curves),
        arms=tuple(arms),
        target=_target(curves, arms, target),
    )


def _target(curves: Sequence[Curves], arms: Sequence[Arm], given: float | None) -> Target | None:
    if given is None and len(curves) == 1:
        return None  # it would be compared with nothing
    chosen = chosen_target([[curves[index] for index in arm.runs] for arm in arms])
    accuracy = chosen if given is None else given
    if accuracy is None or not any(one.evals["step"] for one in curves):
        return None
    seeds = [reached(one, accuracy) for one in curves]
    baseline = next((place for place, arm in enumerate(arms) if arm.is_plain), 0)

    def costs(arm: Arm, axis: str) -> list[float]:
        return [seeds[index].costs[axis] for index in arm.runs]

    return Target(
        accuracy=accuracy,
        is_chosen=given is None,
        baseline=baseline,
        seeds=tuple(seeds),
        ratios=tuple(
            {axis: ratio(costs(arms[baseline], axis), costs(arm, axis)) for axis in AXES}
            for arm in arms
        ),
    )


# ---- the page's JSON ------------------------------------------------------------------------


def to_json(document: Document) -> str:
    """JSON that may stand in a script element of an HTML page, whatever texts are in it."""
    num_runs = len(document.runs)
    longest = max(one.num_steps for one in document.curves)
    each = max(1, math.ceil(longest * num_runs / _MOST_ROWS))
    arm_of = {index: place for place, arm in enumerate(document.arms) for index in arm.runs}
    small = [thinned(one, each) for one in document.curves]
    smooth = [thinned(_smooth(one), each) for one in document.curves]
    content = {
        "runs": [
            {
                **_run(run, one),
                "arm": arm_of[index],
                "samples": shown_samples(run.samples, num_runs=num_runs),
            }
            for index, (run, one) in enumerate(zip(document.runs, small, strict=True))
        ],
        "arms": [_arm(arm, document.curves, smooth) for arm in document.arms],
        "phases": PHASES,
        "target": document.target.accuracy if document.target else None,
        "baseline": document.target.baseline if document.target else None,
        "ratios": _ratios(document.target) if document.target else [],
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    # Neither an end of the script nor a comment of HTML may begin within it.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run(run: Run, curves: Curves) -> dict[str, Any]:
    return {
        "name": run.name,
        "train": _all_short(curves.train),
        "evals": _all_short(curves.evals),
        "phases": curves.phases,
        "num_passes": curves.num_passes,
        "close_step": curves.close_step,
        "steps_a_row": curves.steps_a_row,
        "two_sided": setting(run.config, "sfpo.trigger") == "two_sided",
        "threshold": _shorter(zscore_threshold(run), _AXIS_DIGITS),
        # A config may be written by hand, and JSON has no infinity, no date.
        **{
            name: _shorter(finite(setting(run.config, f"sfpo.entropy_{key}")), _AXIS_DIGITS)
            for name, key in (
                ("window", "window"),
                ("relative", "relative_threshold"),
                ("patience", "patience"),
            )
        },
    }


def _arm(arm: Arm, curves: Sequence[Curves], smooth: Sequence[Curves]) -> dict[str, Any]:
    seeds = [curves[index] for index in arm.runs]
    train_axes, train = over_seeds([smooth[index].train for index in arm.runs], _SMOOTH_BANDS)
    eval_axes, evals = over_seeds([one.evals for one in seeds], _EVAL_BANDS)
    phases = {name: None for one in seeds for name in one.phases}
    seconds = {
        name: [mean(one.train.get(f"time/{name}", [0.0])) for one in seeds] for name in phases
    }
    return {
        "name": arm.name,
        "runs": arm.runs,
        "train": {**_all_short(train_axes), **_bands(train)},
        "evals": {**_all_short(eval_axes), **_bands(evals)},
        "drift": _short(drift_profile(seeds)),
        "phases": {name: _shorter(mean(values)) for name, values in seconds.items()},
    }


def _smooth(curves: Curves) -> Curves:
    """The columns of bands as running means, the others as they are."""
    train = {
        name: running_mean(column, SMOOTHING) if name in _SMOOTH_BANDS else column
        for name, column in curves.train.items()
    }
    return replace(curves, train=train)


def _ratios(target: Target) -> list[dict[str, list[float | int | None]]]:
    """[value, low, high] by axis, an entry an arm; None: it cannot be said, or has no bound."""
    return [
        {
            axis: [
                None if value is None or math.isinf(value) else _shorter(value)
                for value in (found.value, found.low, found.high)
            ]
            for axis, found in arm.items()
        }
        for arm in target.ratios
    ]


def _bands(bands: Mapping[str, Band]) -> dict[str, dict[str, list[float | int | None]]]:
    return {
        name: {"mean": _short(band.mean), "low": _short(band.low), "high": _short(band.high)}
        for name, band in bands.items()
    }


def _all_short(columns: Mapping[str, Column]) -> dict[str, list[float | int | None]]:
    return {
        name: _short(column, _AXIS_DIGITS if name in AXES else _DIGITS)
        for name, column in columns.items()
    }


def _short(column: Column, digits: int = _DIGITS) -> list[float | int | None]:
    return [_shorter(value, digits) for value in column]


def _shorter(value: float | None, digits: int = _DIGITS) -> float | int | None:
    """A few digits of it; counts stay exact."""
    if value is None:
        return None
    if value == math.floor(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{digits}g}")
