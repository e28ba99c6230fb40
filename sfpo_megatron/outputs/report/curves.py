"""A run in columns: its train steps and its evaluations against rollouts, seconds and passes."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfpo_megatron.gate import EntropyGate
from sfpo_megatron.outputs.metrics import is_number
from sfpo_megatron.outputs.report.reading import Run, setting
from sfpo_megatron.outputs.report.zscores import gate_scores

Column = list[float | None]
"""A value a row, None where it was not measured."""

AXES = ("rollouts", "seconds", "passes")
"""What a run costs, summed up to a row: rollouts, seconds of train steps, and backward passes, each
one sweep over a rollout batch."""

SMOOTHING = 7
"""Train steps in the running mean of a noisy series."""

_PLAIN = (
    "reward_mean",
    "accuracy",
    "entropy",
    "clip_frac",
    "grad_norm",
    "logprob_diff_mean",
    "truncated",
    "zero_variance_groups",
    "solved_by_all",
    "solved_by_none",
    "response_tokens_mean",
    "speed/generation_tokens_per_s",
    "speed/training_tokens_per_s",
    "speed/tokens_per_s",
    "engines/busy",
    "engines/queue_s",
    "kv_cache_usage_max",
)
_PASS = re.compile(r"pass_(\d+)/ppo_kl")
_QUANTILE = re.compile(r"(?:response_tokens|reward)_(?:min|p\d+|max)")
_OVERLAPPED = ("generate", "reward")
"""Phases that run beside the step where generation is one step ahead (rollout.async_steps)."""
PHASES = (
    "generate",
    "reward",
    "onload",
    "logprob",
    "reference",
    "passes",
    "reposition",
    "wait",
    "refit",
    "other",
)
"""Phases of a train step, in their order; "other" is the rest of `time/step_s`."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Curves:
    """Columns of one run, by name; all of `train` have a row a train step, all of `evals` one an
    evaluation. Both have `step` and `AXES`."""

    train: dict[str, Column]
    evals: dict[str, Column]
    phases: tuple[str, ...]
    """Phases that make up a step; their columns in `train` are `time/NAME`, in seconds."""
    num_passes: int
    """The most passes of a step: K + 1."""
    close_step: int | None
    """First train step without fast passes after one with them."""
    steps_a_row: int = 1
    """Train steps that each row of `train` is the mean of."""

    @property
    def num_steps(self) -> int:
        """Rows of `train`."""
        return len(self.train.get("step", []))


def curves_of(run: Run) -> Curves:
    """All columns of a run."""
    lines = run.metrics.train
    train: dict[str, Column] = {"step": [float(line["step"]) for line in lines], **_axes(lines)}
    for name in (*_PLAIN, *_found(lines, _QUANTILE)):
        train[name] = _column(lines, name)
    train["reward_smooth"] = running_mean(train["reward_mean"], SMOOTHING)
    drifts = sorted(_found(lines, _PASS), key=_pass_number)
    for name in drifts:
        train[name] = _column(lines, name)
    # Of a step without fast passes too, whose only pass is pass_1.
    train["ppo_kl"] = _column(lines, "ppo_kl")
    scores = gate_scores(train["entropy"], _gate(run))
    train |= {"z": scores.z, "bound": scores.bound, "low_bound": scores.low_bound}
    phases = _add_phases(train, run)
    return Curves(
        train={name: column for name, column in train.items() if _has_values(column)},
        evals=_evals(run, train),
        phases=phases,
        num_passes=max((_pass_number(name) for name in drifts), default=0),
        close_step=run.metrics.gate_close_step,
    )


def _gate(run: Run) -> EntropyGate:
    """The gate of the run's config, which may be an older version's or written by hand."""

    def number(name: str, fallback: float) -> float:
        return _number(setting(run.config, f"sfpo.{name}"), fallback)

    return EntropyGate(
        window=max(2, int(number("entropy_window", 30))),
        zscore_threshold=zscore_threshold(run),
        relative_threshold=finite(setting(run.config, "sfpo.entropy_relative_threshold")),
        two_sided=setting(run.config, "sfpo.trigger") == "two_sided",
        patience=max(1, int(number("entropy_patience", 1))),
        window_excludes_newest=setting(run.config, "sfpo.entropy_window_excludes_newest") is True,
        warmup_steps=int(number("entropy_warmup_steps", 0)),
    )


def zscore_threshold(run: Run) -> float | None:
    """The gate's; None where the run's config has null, the default where it has none."""
    section = setting(run.config, "sfpo")
    name = "entropy_zscore_threshold"
    found = section.get(name, 1.0) if isinstance(section, dict) else 1.0
    return None if found is None else _number(found, 1.0)


def _axes(lines: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    rollouts = _column(lines, "num_rollouts")
    return {
        "rollouts": rollouts,
        "seconds": _sums(_column(lines, "time/step_s")),
        "passes": _sums(_column(lines, "num_passes")),
    }


def _evals(run: Run, train: Mapping[str, Column]) -> dict[str, Column]:
    lines = run.metrics.evals
    names = sorted({name for line in lines for name in line if name.startswith("eval/")})
    columns: dict[str, Column] = {"step": [float(line["step"]) for line in lines]}
    for axis in AXES:
        columns[axis] = [_at(train, axis, line["step"]) for line in lines]
    return columns | {name.removeprefix("eval/"): _column(lines, name) for name in names}


def _at(train: Mapping[str, Column], axis: str, step: int) -> float:
    """What had been spent after a train step; 0 before the first."""
    row = bisect_right(train["step"], float(step), key=lambda at: at or 0.0)
    return (train[axis][row - 1] or 0.0) if row else 0.0


def _add_phases(train: dict[str, Column], run: Run) -> tuple[str, ...]:
    """Add the columns of the phases; the names of those that there are."""
    lines = run.metrics.train
    whole = _column(lines, "time/step_s")
    if not _has_values(whole):
        return ()
    is_async = bool(setting(run.config, "rollout.async_steps"))
    wanted = [name for name in PHASES[:-1] if not (is_async and name in _OVERLAPPED)]
    columns = {name: _column(lines, f"time/{name}_s") for name in wanted}
    columns = {name: column for name, column in columns.items() if any(column)}
    rest: Column = []
    for row, seconds in enumerate(whole):
        spent = math.fsum(column[row] or 0.0 for column in columns.values())
        rest.append(None if seconds is None else max(0.0, seconds - spent))
    columns[PHASES[-1]] = rest
    train |= {f"time/{name}": column for name, column in columns.items()}
    return tuple(columns)


def thinned(curves: Curves, each: int) -> Curves:
    """A row for `each` train steps: their means, and of sums so far those at their end."""
    if each == 1:
        return curves
    starts = range(0, curves.num_steps, each)

    def means(name: str, column: Column) -> Column:
        parts = [column[start : start + each] for start in starts]
        if name == "step" or name in AXES:
            return [part[-1] for part in parts]
        return [mean(part) for part in parts]

    train = {name: means(name, column) for name, column in curves.train.items()}
    return replace(curves, train=train, steps_a_row=each)


def running_mean(column: Column, width: int) -> Column:
    """The mean of up to `width` rows around each, fewer at the ends."""
    half = width // 2
    return [mean(column[max(0, row - half) : row + half + 1]) for row in range(len(column))]


def mean(column: Sequence[float | None]) -> float | None:
    """The mean of what was measured; None of nothing."""
    values = [value for value in column if value is not None]
    return math.fsum(values) / len(values) if values else None


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> Column:
    return [finite(line.get(name)) for line in lines]


def finite(found: Any) -> float | None:
    """The value of a line if it is a number (`is_number`), else None."""
    return float(found) if is_number(found) else None


def _sums(column: Column) -> Column:
    total, sums = 0.0, []
    for value in column:
        total += value or 0.0
        sums.append(total)
    return list(sums) if _has_values(column) else [None] * len(column)


def _found(lines: Sequence[Mapping[str, Any]], pattern: re.Pattern[str]) -> list[str]:
    return sorted({name for line in lines for name in line if pattern.fullmatch(name)})


def _pass_number(name: str) -> int:
    match = _PASS.fullmatch(name)
    return int(match[1]) if match else 0


def _has_values(column: Column) -> bool:
    return any(value is not None for value in column)


def _number(found: Any, default: float) -> float:
    value = finite(found)
    return default if value is None else value
