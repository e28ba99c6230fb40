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
from typing import Any

from sfpo_megatron.data.prepared import Prepared, generated, prepare

TASK = "leg_counting"
ARGS = {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 9}
TRAIN, EVAL = "legs-train", "legs-eval"
SIZES = {TRAIN: 10_000, EVAL: 512}


def worked_solution(entry: Mapping[str, Any]) -> str:
    """A line for each animal, from the second on one for the sum so far, and the answer."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines: list[str] = []
    total = 0
    for animal, count in entry["metadata"]["animals"].items():
        legs = count * ANIMALS[animal]
        new = f"{count} {animal}{'s' * (count > 1)}: {count}*{ANIMALS[animal]}={legs}"
        lines += [new, f"{total}+{legs}={total + legs}"] if lines else [new]
        total += legs
    return "\n".join([*lines, f"Answer: {total}"])


def write_data(out: Path) -> None:
    """Write OUT/legs-train.parquet and OUT/legs-eval.parquet."""

    def problems(seed: int, size: int) -> Callable[[], Prepared]:
        return lambda: generated(TASK, ARGS, size=size, seed=seed, worked=worked_solution)

    prepare({name: problems(seed, size) for seed, (name, size) in enumerate(SIZES.items())}, out)
