"""Seconds of training until both trainers answer equally well, each from the same warm start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.versus import ours, theirs
from benchmarks.versus.cases import CASES, Step, prepare

HEADER = "trainer | lr | sweeps | seed | seconds to accuracy | train steps"
CASE = CASES[0]
"""The case whose task is raced on: TRL shares the cores in the way that was faster in it."""
ACCURACY = 0.75
"""Share of the rollouts of `BATCHES` batches together, whose prompts were not trained on before."""
BATCHES = 3
NUM_STEPS = 60
SEEDS = (0, 1, 2)
"""Seeds of prompts and sampling; all start from one policy."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Arm:
    """Who races, and how."""

    trainer: str
    sweeps: int
    """Over each batch: ours are SFPO's K + 1."""
    lr: float
    """The best for that many sweeps; GRPO breaks at twice its own, plain sweeps at twice theirs."""


ARMS = (
    Arm(trainer="ours", sweeps=4, lr=4.0e-4),
    Arm(trainer="TRL", sweeps=1, lr=8.0e-4),
    Arm(trainer="TRL", sweeps=4, lr=4.0e-4),
)


def run(
    python: Path, folder: Path, layout: theirs.Layout, *, quick: bool
) -> Iterator[dict[str, Any]]:
    """What each arm came to, seed by seed; the first train step's seconds are those of the second.
    `layout`: how TRL shares the cores."""
    # All from one warm start; the config is ours alone.
    case, num_steps = replace(CASE, sweeps=ARMS[0].sweeps), 6 if quick else NUM_STEPS
    material = prepare(case, folder / "race")
    for seed in SEEDS[:1] if quick else SEEDS:
        for number, arm in enumerate(ARMS):
            log = material.config.with_name(f"{seed}-{number}.log")
            steps: Sequence[Step]
            if arm.trainer == "ours":
                steps = ours.run(material, num_steps, arm.lr, log, seed=seed)
            else:
                given = replace(case, sweeps=arm.sweeps)
                steps = theirs.run(
                    python, layout, given, material, num_steps, arm.lr, log, seed=seed
                )
            of_trl = {} if arm.trainer == "ours" else {"layout": layout.name}
            yield asdict(arm) | of_trl | {"seed": seed} | reached(steps)


def faster_layout(measured: Sequence[dict[str, Any]]) -> theirs.Layout | None:
    """TRL's in `CASE`, among rows of rows.py; None where that case was not measured."""
    names = [row["trl_layout"] for row in measured if row["case"] == CASE.name]
    return next((one for one in theirs.LAYOUTS if one.name in names), None)


def reached(steps: Sequence[Step]) -> dict[str, Any]:
    """When the last batches first had the accuracy; null if they never did."""
    for end in range(BATCHES, len(steps) + 1):
        if fmean(step.accuracy for step in steps[end - BATCHES : end]) >= ACCURACY:
            seconds = steps[0].seconds + sum(step.seconds for step in steps[:end])
            return {"seconds": seconds, "steps": end + 1, "accuracy": ACCURACY}
    return {"seconds": None, "steps": None, "accuracy": ACCURACY}


def line(found: dict[str, Any]) -> str:
    """A row below `HEADER`."""
    return (
        f"{found['trainer']} | {found['lr']:g} | {found['sweeps']} | {found['seed']} | "
        f"{_told(found['seconds'])} | {found['steps']}"
    )


def medians(races: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm's median over its seeds; null where half of them never got there."""
    found = []
    for arm in ARMS:
        seconds = [
            math.inf if one["seconds"] is None else one["seconds"]
            for one in races
            if (one["trainer"], one["sweeps"]) == (arm.trainer, arm.sweeps)
        ]
        if seconds:
            middle = median(seconds)
            found.append(
                asdict(arm)
                | {"seeds": len(seconds), "seconds": middle if math.isfinite(middle) else None}
            )
    return found


def median_line(found: dict[str, Any]) -> str:
    """What an arm came to, in words."""
    sweeps = f"{found['sweeps']} sweep{'s' if found['sweeps'] > 1 else ''}"
    return f"{found['trainer']}, {sweeps}: {_told(found['seconds'])} (median of {found['seeds']})"


def _told(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"
