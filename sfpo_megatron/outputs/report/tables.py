"""The tables of a report: they stand in the page without its script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import yaml

from sfpo_megatron.outputs.report.arms import Arm, differing
from sfpo_megatron.outputs.report.curves import AXES, Column, Curves, finite, mean
from sfpo_megatron.outputs.report.document import Document, Target
from sfpo_megatron.outputs.report.html import Markup, element, folded, joined, table, text
from sfpo_megatron.outputs.report.reading import Run
from sfpo_megatron.outputs.report.target import Ratio, Reached

_NOTHING = "–"
_COSTS = {"rollouts": "rollouts", "seconds": "seconds", "passes": "backward passes"}


def runs_table(document: Document) -> Markup:
    """A row a run: how far it is, where it began and ended, what it took."""
    header = [
        "run", "arm", "train steps", "accuracy: start", "end", "best", "rollouts",
        "backward passes", "gate closed", "s / step",
    ]  # fmt: skip
    arm_of = {index: arm.name for arm in document.arms for index in arm.runs}
    rows = []
    for index, (run, curves) in enumerate(zip(document.runs, document.curves, strict=True)):
        accuracy = [v for v in curves.evals.get("accuracy", []) if v is not None]
        steps = f"{run.last_step:,}" + (f" of {run.num_steps:,}" if run.num_steps else "")
        rows.append(
            [
                run.name,
                arm_of[index],
                steps,
                *(percent(f(accuracy)) if accuracy else _NOTHING for f in (_first, _last, max)),
                *(count(end_of(curves.train.get(axis))) for axis in ("rollouts", "passes")),
                gate_said(run, curves),
                number(mean(_seconds(document, index))),
            ]
        )
    return table("Runs; accuracy is held out", header, rows, words=2)


def begun_late(document: Document) -> Iterator[Markup]:
    """What is to be said of runs whose first line is of a later step: the axes of their costs do
    not begin at one point."""
    for run, curves in zip(document.runs, document.curves, strict=True):
        first = curves.train.get("step", [None])[0]
        if first is not None and first > 1:
            yield element(
                "p",
                text(
                    f"The lines of {run.name} begin at train step {count(first)}. Its rollouts are "
                    "counted from the beginning of the run whose checkpoint it goes on from, its "
                    "seconds and backward passes from that step."
                ),
            )


def gate_said(run: Run, curves: Curves) -> str:
    """When the gate closed."""
    if curves.num_passes <= 1:
        return "no fast passes"
    if curves.close_step:
        return f"step {curves.close_step}"
    return "never" if run.last_step == run.num_steps else "not yet"


def _seconds(document: Document, index: int) -> Column:
    """Seconds of each train step."""
    curves = document.curves[index]
    columns = [curves.train[f"time/{name}"] for name in curves.phases]
    return [math.fsum(value or 0.0 for value in row) for row in zip(*columns, strict=True)]


def arms_table(document: Document) -> Markup:
    """A row an arm: means over its seeds, with the lowest and the highest."""
    header = ["arm", "runs", "accuracy: start", "end", "best", "s / step"]
    rows = []
    for arm in document.arms:
        seeds = [document.curves[index] for index in arm.runs]
        found = [[v for v in one.evals.get("accuracy", []) if v is not None] for one in seeds]
        with_evals = [values for values in found if values]
        rows.append(
            [
                arm.name,
                str(len(arm.runs)),
                *(spread([f(values) for values in with_evals]) for f in (_first, _last, max)),
                number(mean([mean(_seconds(document, index)) for index in arm.runs])),
            ]
        )
    return table("Arms: mean over seeds (lowest to highest); accuracy is held out", header, rows)


# ---- the target -----------------------------------------------------------------------------


def target_tables(document: Document, target: Target) -> Markup:
    """What it took to reach the target, by arm and by seed."""
    baseline = document.arms[target.baseline]
    rows = []
    for place, arm in enumerate(document.arms):
        seeds = [target.seeds[index] for index in arm.runs]
        there = sum(seed.step is not None for seed in seeds)
        row = [arm.name, f"{there} of {len(seeds)}"]
        for axis in AXES:
            row.append(_median([seed.costs[axis] for seed in seeds]))
            if len(document.arms) > 1:
                is_baseline = place == target.baseline
                row.append("1 (baseline)" if is_baseline else said(target.ratios[place][axis]))
        rows.append(row)
    header = ["arm", "seeds there"]
    for name in _COSTS.values():
        header += [name, *(["times fewer"] if len(document.arms) > 1 else [])]
    caption = f"To reach {percent(target.accuracy)}: medians over seeds"
    if len(document.arms) > 1:
        caption += f"; times fewer: {baseline.name} ÷ the arm, with its 95 % interval"
    return joined(table(caption, header, rows, words=1), _seeds(document, target))


def _seeds(document: Document, target: Target) -> Markup:
    rows = []
    for arm in document.arms:
        for index in arm.runs:
            seed = target.seeds[index]
            rows.append([document.runs[index].name, arm.name, *_of_seed(seed)])
    header = ["run", "arm", "reached", *_COSTS.values(), "best"]
    caption = f"Each seed and {percent(target.accuracy)}"
    return folded("Seed by seed", table(caption, header, rows, words=3))


def _of_seed(seed: Reached) -> Iterator[str]:
    if seed.step is not None:
        yield f"at step {seed.step}"
        yield from (count(seed.costs[axis]) for axis in AXES)
    else:
        yield "never so far"
        yield from (f"> {count(seed.spent[axis])}" for axis in AXES)
    yield percent(seed.best)


def _median(costs: Sequence[float]) -> str:
    middle = median(costs)
    return "not reached" if math.isinf(middle) else count(middle)


def said(found: Ratio) -> str:
    """A ratio with its interval in words."""
    if found.value is None:
        return "cannot be said"
    if math.isinf(found.value):
        return "baseline not there"
    if found.value == 0:
        return "arm not there"
    value = f"{found.value:.2f}"
    if found.low is None or found.high is None:
        return f"{value} (one seed)"
    high = "no bound" if math.isinf(found.high) else f"{found.high:.2f}"
    return f"{value} ({found.low:.2f} to {high})"


# ---- evaluations, config, environment ---------------------------------------------------------


def evaluations(document: Document) -> Markup:
    """What each run's evaluations found, and the figures of `sfpo-megatron eval`."""
    parts = []
    for run, curves in zip(document.runs, document.curves, strict=True):
        names = [n for n in curves.evals if n not in ("step", *AXES)]
        if curves.evals["step"]:
            rows = [
                [count(step), *(number(curves.evals[name][row]) for name in names)]
                for row, step in enumerate(curves.evals["step"])
            ]
            header = ["step", *(name.replace("_", " ") for name in names)]
            found = table(f"Evaluations of {run.name}", header, rows)
            parts.append(found if len(document.runs) == 1 else folded(run.name, found))
        parts += _figures(run.name, run.evaluated)
    return joined(*parts) if parts else element("p", text("No evaluation yet."))


def _figures(name: str, found: dict[str, Any]) -> Iterator[Markup]:
    """The models of an eval/results.json, as far as they are as `evaluation.report` writes them."""
    models = found.get("models")
    for model, sources in models.items() if isinstance(models, dict) else ():
        rows = []
        for source, one in sources.items() if isinstance(sources, dict) else ():
            if not isinstance(one, dict):
                continue
            passes, n = one.get("pass_at"), one.get("n")
            at_n = passes.get(str(n)) if isinstance(passes, dict) else None
            accuracy, stderr = (percent(finite(one.get(name))) for name in ("accuracy", "stderr"))
            rows.append(
                [
                    source,
                    *(count(finite(value)) for value in (one.get("num_problems"), n)),
                    f"{accuracy} ± {stderr}",
                    *(percent(finite(value)) for value in (one.get("majority"), at_n)),
                ]
            )
        header = ["source", "problems", "n", "avg@n ± error", "maj@n", "pass@n"]
        yield table(f"sfpo-megatron eval in {name}: {model}", header, rows)


def config_tables(document: Document) -> Markup:
    """What differs between the runs, then each config whole."""
    configs = [run.settings for run in document.runs]
    keys = [key for key in differing(configs) if key != "output_dir"]
    parts = []
    if len(configs) > 1:
        rows = [[key, *(config.get(key, "unset") for config in configs)] for key in keys]
        header = ["key", *(run.name for run in document.runs)]
        parts.append(
            table("Settings that are not the same in all runs", header, rows, words=len(header))
            if rows
            else element("p", text("All settings are the same but output_dir."))
        )
        parts += [part for arm in document.arms for part in _within(document, arm)]
    for run in document.runs:
        dumped = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        shown = dumped if run.config else "no config.yaml in this RUN"
        code = element("pre", text(shown), tabindex="0", aria_label=f"config.yaml of {run.name}")
        parts.append(folded(f"config.yaml of {run.name}", code))
    return joined(*parts)


def _within(document: Document, arm: Arm) -> Iterator[Markup]:
    """What is to be said of the runs of an arm: that they differ in more than the seed, or not in
    it."""
    settings = [document.runs[index].settings for index in arm.runs]
    keys = [key for key in differing(settings) if key != "output_dir"]
    if keys and keys != ["seed"]:
        yield element("p", text(f"Runs of {arm.name} differ in {', '.join(keys)}."))
    seeds = [one["seed"] for one in settings if "seed" in one]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        said = f"Several runs of {arm.name} have the same seed ({', '.join(twice)})"
        yield element("p", text(f"{said}: they are not independent, and intervals too narrow."))


def environment_tables(document: Document) -> Markup:
    """Each start of each run, and of which versions it was."""
    starts = [(run.name, start) for run in document.runs for start in run.starts]
    if not starts:
        return element("p", text("No environment.jsonl: these runs are of a version before it."))
    own = ("started", "after_step", "host")
    rows = [[name, *(str(start.get(key, _NOTHING)) for key in own)] for name, start in starts]
    header = ["run", *(key.replace("_", " ") for key in own)]
    when = table("When and where each run was started", header, rows, words=len(header))
    return joined(when, _versions(starts, without=("run_id", *own)))


def _versions(starts: Sequence[tuple[str, dict[str, Any]]], *, without: Sequence[str]) -> Markup:
    """Hardware, commit and versions: a column for all starts in which they are the same."""
    kinds: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run, start in starts:
        kind = tuple((name, str(value)) for name, value in start.items() if name not in without)
        kinds.setdefault(kind, []).append(run)
    columns = [dict(kind) for kind in kinds]
    names = {name: None for column in columns for name in column}
    rows = [[name, *(column.get(name, _NOTHING) for column in columns)] for name in names]
    of = [", ".join(dict.fromkeys(runs)) for runs in kinds.values()]
    header = ["", *(["all runs"] if len(of) == 1 and ", " in of[0] else of)]
    return table("Hardware, commit and versions", header, rows, words=len(header))


# ---- figures as text ------------------------------------------------------------------------


def percent(share: float | None) -> str:
    """A share with one decimal."""
    return _NOTHING if share is None else f"{100 * share:.1f} %"


def count(value: float | None) -> str:
    """A whole number."""
    return _NOTHING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return _NOTHING
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def number(value: float | None) -> str:
    """Four digits."""
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if value == round(value) and abs(value) >= 10 else f"{value:.4g}"


def spread(values: Sequence[float]) -> str:
    """The mean of shares, with the lowest and the highest."""
    if not values:
        return _NOTHING
    middle = percent(mean(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _first(values: Sequence[float]) -> float:
    return values[0]


def _last(values: Sequence[float]) -> float:
    return values[-1]


def end_of(column: Column | None) -> float | None:
    """The last value of a column that may not be there."""
    return column[-1] if column else None
