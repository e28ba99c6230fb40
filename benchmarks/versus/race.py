"""Seconds of training until both trainers answer equally well, each from the same warm start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.versus import ours, theirs
from benchmarks.versus.cases import CASES, Step, prepare

HEADER = "trainer | lr | sweeps | seconds to accuracy | train steps"
ACCURACY = 0.75
"""Share of the rollouts of `BATCHES` batches together, whose prompts were not trained on before."""
BATCHES = 3
NUM_STEPS = 60


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


def run(python: Path, folder: Path, *, quick: bool) -> Iterator[dict[str, Any]]:
    """What each arm came to; the first train step's seconds are those of the second."""
    # All from one warm start; the config is ours alone.
    case, num_steps = replace(CASES[0], sweeps=ARMS[0].sweeps), 6 if quick else NUM_STEPS
    material = prepare(case, folder / "race")
    for number, arm in enumerate(ARMS):
        log = material.config.with_name(f"{number}.log")
        steps: Sequence[Step]
        if arm.trainer == "ours":
            steps = ours.run(material, num_steps, arm.lr, log)
        else:
            given = replace(case, sweeps=arm.sweeps)
            steps = theirs.run(python, theirs.LAYOUTS[0], given, material, num_steps, arm.lr, log)
        yield asdict(arm) | reached(steps)


def reached(steps: Sequence[Step]) -> dict[str, Any]:
    """When the last batches first had the accuracy; null if they never did."""
    for end in range(BATCHES, len(steps) + 1):
        if fmean(step.accuracy for step in steps[end - BATCHES : end]) >= ACCURACY:
            seconds = steps[0].seconds + sum(step.seconds for step in steps[:end])
            return {"seconds": seconds, "steps": end + 1, "accuracy": ACCURACY}
    return {"seconds": None, "steps": None, "accuracy": ACCURACY}


def line(found: dict[str, Any]) -> str:
    """A row below `HEADER`."""
    seconds = "never" if found["seconds"] is None else f"{found['seconds']:.1f}"
    return (
        f"{found['trainer']} | {found['lr']:g} | {found['sweeps']} | {seconds} | {found['steps']}"
    )
