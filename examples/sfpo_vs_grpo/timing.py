"""What a rollout costs in each arm, from runs of all arms in turns: results/TASK/timing.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cells import timing_file
from pairs import PairedRatio, paired_ratio

NUM_STEPS = 16
"""Train steps of a run; the first is left out (costs.py)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Timing:
    """One file."""

    about: Mapping[str, Any]
    seconds: Mapping[str, Sequence[float]]
    """Seconds of a train step by its rollouts: arm -> one a round."""

    def cost(self, arm: str, base: str) -> PairedRatio:
        """How many times as much a rollout costs in `arm` as in `base`, the mean over rounds."""
        return paired_ratio(self.seconds[arm], self.seconds[base], budget=1.0)

    @property
    def told(self) -> str:
        """How it was measured."""
        rounds = len(next(iter(self.seconds.values())))
        return (
            f"from {rounds} rounds of runs of {self.about['num_steps']} train steps, all arms in "
            "turns and nothing beside them "
            f"(commit {self.about['commit'][:7]}, {self.about['hardware']})"
        )


def of(task: str) -> Timing | None:
    """What was measured; None if nothing was."""
    file = timing_file(task)
    if not file.exists():
        return None
    about = json.loads(file.read_text(encoding="utf-8"))
    return Timing(about=about, seconds=about.pop("seconds_a_rollout"))


def turns(arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, arm), each round begun by the next arm, so that none is always first."""
    for number in range(rounds):
        first = number % len(arms)
        yield from ((number, arm) for arm in (*arms[first:], *arms[:first]))
