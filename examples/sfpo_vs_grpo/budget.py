"""What the study takes of the hours that study.toml gives it: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import costs
from cells import Study
from tables import table


def told(study: Study) -> Iterator[str]:
    """A row for each task, and the sum."""
    settings = study.settings["budget"]
    yield "## Budget\n"
    rows, whole = [], 0.0
    for task in study.tasks:
        runs = study.everything(task)
        minutes, is_measured = minutes_a_run(study, task)
        hours = hours_of(study, task)
        whole += hours
        spent = sum(run.about["seconds"] for run in runs) / 3600 / settings["jobs"]
        rows.append([
            task,
            f"{len(runs)} of {num_planned(study, task)}",
            _seconds_a_step(study, task),
            f"{minutes:.1f}" + ("" if is_measured else " (estimate)"),
            f"{spent:.1f}",
            f"{hours:.1f}",
        ])  # fmt: skip
    head = ("task", "runs", "seconds a step: GRPO, SFPO", "minutes a run", "hours so far", "in all")
    yield from table(head, rows)
    yield (
        f"\nIn all {whole:.0f} hours of the {settings['hours']} that `[budget]` of study.toml has, "
        f"{settings['jobs']} runs at a time, without the warm starts (one a seed) and without the "
        "learning rates that are still to be added where the best is at an end.\n"
    )


def hours_of(study: Study, task: str) -> float:
    """Hours of all runs of a task, as many at a time as study.toml says."""
    minutes, _ = minutes_a_run(study, task)
    return num_planned(study, task) * minutes / 60 / study.settings["budget"]["jobs"]


def minutes_a_run(study: Study, task: str) -> tuple[float, bool]:
    """(minutes, whether they were measured): of the task's runs, before any the estimate."""
    if runs := study.everything(task):
        return mean(run.about["seconds"] for run in runs) / 60, True
    return study.settings["budget"]["minutes_a_run"][task], False


def num_planned(study: Study, task: str) -> int:
    """Runs of a task, those included that have been made."""
    tuning = sum(len(study.lrs(task, arm)) for arm in study.arms)
    tuning *= len(study.settings["tuning_seeds"])
    number = tuning + len(study.arms) * len(study.confirming_seeds(task))
    if task == study.settings["gates"]["task"]:
        number += len(study.settings["gates"]["forks"]) * len(study.fork_seeds(task))
    if task == study.settings["ablations"]["task"]:
        number += len(study.ablation_arms()) * len(study.settings["ablations"]["seeds"])
    return number


def _seconds_a_step(study: Study, task: str) -> str:
    """Seconds of both arms at the lrs that were chosen."""
    means = []
    for arm in ("grpo", "sfpo"):
        lr = study.frozen(task).get("lrs", {}).get(arm)
        runs = study.outcomes(task, arm, lr, study.confirming_seeds(task)) if lr else []
        if not runs:
            return "-"
        means.append(mean(costs.a_rollout(run) * costs.rollouts_a_step(run) for run in runs))
    return ", ".join(f"{seconds:.2f}" for seconds in means)
