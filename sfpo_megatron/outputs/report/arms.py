"""Arms: runs that differ in nothing that bears on their course but the seed, and their means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sfpo_megatron.config.changes import WITHOUT_BEARING
from sfpo_megatron.outputs.report.curves import AXES, Column, Curves, mean
from sfpo_megatron.outputs.report.reading import ReportError, Run

_MODEL = "model.path"
_FREE = (*WITHOUT_BEARING, "seed", _MODEL, "eval", "sft")
"""Keys and sections in which the runs of an arm may differ; the model, see `_by_model`."""
_NAMED = {
    *("sfpo.num_fast_passes", "sfpo.alpha", "sfpo.trajectory"),
    *("objective.advantage", "objective.loss"),
}
_MOST_KEYS, _MOST_CHARS = 2, 24


@dataclass(kw_only=True, frozen=True, slots=True)
class Arm:
    """Runs that are compared with others as one."""

    name: str
    runs: tuple[int, ...]
    """Their places among the runs of the report."""
    is_plain: bool
    """Whether it has no fast passes: what SFPO is compared with."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Band:
    """One column over the seeds of an arm, at the steps that all of them have reached."""

    mean: Column
    low: Column
    """The lowest seed."""
    high: Column


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose value is not the same in all flat configs, in the order of the first."""
    keys = {key: None for config in configs for key in config}
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def grouped(runs: Sequence[Run], first: int = 0) -> list[Arm]:
    """Runs by what bears on their course, in the order of their first runs; `first`: the place of
    `runs[0]` among those of the report."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(tuple(sorted(_course(run.settings).items())), []).append(index)
    arms = [
        (dict(key) | model, together)
        for key, indices in groups.items()
        for model, together in _by_model(runs, indices)
    ]
    arms.sort(key=lambda arm: arm[1][0])
    names = _names([course for course, _ in arms])
    return [
        Arm(
            name=name,
            runs=tuple(first + index for index in indices),
            is_plain=_is_plain(course),
        )
        for name, (course, indices) in zip(names, arms, strict=True)
    ]


def _by_model(
    runs: Sequence[Run], indices: Sequence[int]
) -> Iterator[tuple[dict[str, str], list[int]]]:
    """The runs of each model. Where each run has a model and a seed of its own, these are seeds of
    a warm start: they stay together."""
    models: dict[str, list[int]] = {}
    for index in indices:
        models.setdefault(runs[index].settings.get(_MODEL, ""), []).append(index)
    seeds = {runs[index].settings.get("seed") for index in indices}
    if len(models) == len(seeds) == len(indices) > 1:
        yield {}, list(indices)
        return
    for model, together in models.items():
        yield {_MODEL: model}, together


def named(name: str, indices: Sequence[int], runs: Sequence[Run]) -> Arm:
    """An arm as the user has put it together."""
    plain = all(_is_plain(runs[index].settings) for index in indices)
    return Arm(name=name, runs=tuple(indices), is_plain=plain)


def check_names(arms: Sequence[Arm]) -> None:
    """ReportError for two arms of one name."""
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ReportError(
                f"--arm {name}: found two arms of that name, expected one; choose another name"
            )


def _is_plain(config: Mapping[str, str]) -> bool:
    return config.get("sfpo.num_fast_passes") == "0"


def _course(config: Mapping[str, str]) -> dict[str, str]:
    """What bears on the course of a run, but for its seed."""
    plain = _is_plain(config)
    return {
        key: value
        for key, value in config.items()
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
        # Without fast passes there is no reposition, and a gate has nothing to close.
        and not (plain and key.startswith("sfpo.") and key != "sfpo.num_fast_passes")
    }


def _names(groups: Sequence[Mapping[str, str]]) -> list[str]:
    """A name each: what the update is, and where that is not enough, the settings that differ."""
    bases = [_base(group) for group in groups]
    names = []
    for group, base in zip(groups, bases, strict=True):
        twins = [other for other, its in zip(groups, bases, strict=True) if its == base]
        keys = [key for key in differing(twins) if key not in _NAMED]
        if keys != [_MODEL]:  # each seed of a warm start has its own
            keys = [key for key in keys if key != _MODEL]
        told = [_told(key, group.get(key, "unset")) for key in keys[:_MOST_KEYS]]
        if len(keys) > _MOST_KEYS:
            told.append(f"{len(keys) - _MOST_KEYS} more")
        names.append(", ".join([base, *told]))
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _told(key: str, value: str) -> str:
    name = key.rpartition(".")[2]
    value = value.strip('"').rpartition("/")[2]  # of a path, its end
    return f"{name} {value}" if len(value) <= _MOST_CHARS else f"another {name}"


def _base(config: Mapping[str, str]) -> str:
    if not config:
        return "no config.yaml"
    advantage = config.get("objective.advantage", "").strip('"')
    loss = config.get("objective.loss", "").strip('"')
    objective = advantage.upper() if advantage.isascii() and len(advantage) < 6 else advantage
    objective += "" if loss in ("ppo_clip", "") else f" {loss}"
    k, alpha = config.get("sfpo.num_fast_passes", "?"), config.get("sfpo.alpha", "?")
    if k == "0":
        return objective
    predicted = config.get("sfpo.trajectory", "").strip('"') == "predicted"
    if alpha in ("1", "1.0") and not predicted:  # nothing is repositioned
        return f"{objective}, {int(k) + 1} plain passes" if k.isdigit() else objective
    return f"{'PrePO' if predicted else 'SFPO'} K={k} α={alpha}" + (
        "" if objective in ("GRPO", "") else f" on {objective}"
    )


def over_seeds(
    seeds: Sequence[Mapping[str, Column]], names: Sequence[str]
) -> tuple[dict[str, Column], dict[str, Band]]:
    """Rows at the steps that every seed has: `step` and the means of `AXES`, and the bands of those
    columns of `names` that every seed has. Seeds that have not begun are left out."""
    seeds = [one for one in seeds if one.get("step")]
    if not seeds:
        return {}, {}
    places = [{step: row for row, step in enumerate(one["step"])} for one in seeds]
    steps = [step for step in places[0] if all(step in place for place in places)]
    rows = [[place[step] for place in places] for step in steps]

    def picked(name: str) -> list[list[float | None]]:
        return [[one[name][row] for one, row in zip(seeds, row_of, strict=True)] for row_of in rows]

    axes: dict[str, Column] = {"step": steps}
    for axis in AXES:
        if all(axis in one for one in seeds):
            axes[axis] = [mean(values) for values in picked(axis)]
    bands = {}
    for name in names:
        if all(name in one for one in seeds):
            whole = [[v for v in row if v is not None] for row in picked(name)]
            bands[name] = Band(
                mean=[mean(values) for values in whole],
                low=[min(values, default=None) for values in whole],
                high=[max(values, default=None) for values in whole],
            )
    return axes, bands


def drift_profile(curves: Sequence[Curves]) -> Column:
    """Mean KL to the policy before the step (nats), for pass 1 to K + 1 of the steps with fast
    passes, over all runs alike."""
    most = max((one.num_passes for one in curves), default=0)
    profile: Column = []
    for number in range(1, most + 1):
        means = [mean(_where_fast(one, f"pass_{number}/ppo_kl")) for one in curves]
        profile.append(mean(means))
    return profile


def _where_fast(curves: Curves, name: str) -> Column:
    """The rows of steps that had all passes."""
    last = curves.train.get(f"pass_{curves.num_passes}/ppo_kl", [])
    column = curves.train.get(name, [None] * len(last))
    return [value for value, ran in zip(column, last, strict=True) if ran is not None]
