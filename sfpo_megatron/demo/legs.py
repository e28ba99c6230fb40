"""The demo's problems, reasoning-gym's `leg_counting`, with worked solutions to imitate.

how many legs are there in total if you have 3 deers, 2 spiders?

3 deers: 3*4=12
2 spiders: 2*8=16
12+16=28
Answer: 28
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from sfpo_megatron.data.prepared import Prepared, generated, prepare

TASK = "leg_counting"
ARGS = {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 2}
TRAIN, EVAL = "legs-train", "legs-eval"
FORGETS = 0.65
SIZES = {TRAIN: 10_000, EVAL: 600}


def worked_solution(entry: Mapping[str, Any], *, forgets: float = 0.0) -> str:
    """A line for each animal, one for their sum, and the answer. `forgets`: share of the solutions
    without the sum, whose answer is the last animal's; the same in every process."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines: list[str] = []
    legs: list[int] = []
    for animal, count in entry["metadata"]["animals"].items():
        legs.append(count * ANIMALS[animal])
        lines.append(f"{count} {animal}{'s' * (count > 1)}: {count}*{ANIMALS[animal]}={legs[-1]}")
    if Random(entry["question"]).random() < forgets:
        return "\n".join([*lines, f"Answer: {legs[-1]}"])
    return "\n".join([*lines, f"{'+'.join(map(str, legs))}={sum(legs)}", f"Answer: {sum(legs)}"])


def forgetful_solution(entry: Mapping[str, Any]) -> str:
    """The worked solution of who knows how, and mostly forgets to add."""
    return worked_solution(entry, forgets=FORGETS)


def write_data(out: Path) -> None:
    """Write OUT/legs-train.parquet and OUT/legs-eval.parquet."""

    def problems(seed: int, size: int) -> Callable[[], Prepared]:
        return lambda: generated(TASK, ARGS, size=size, seed=seed, worked=forgetful_solution)

    prepare({name: problems(seed, size) for seed, (name, size) in enumerate(SIZES.items())}, out)
