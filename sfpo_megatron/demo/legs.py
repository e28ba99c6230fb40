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
ARGS = {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 5}
TRAIN, EVAL = "legs-train", "legs-eval"
SLIPS = 0.35
SIZES = {TRAIN: 10_000, EVAL: 600}


def worked_solution(entry: Mapping[str, Any], *, slips: float = 0.0) -> str:
    """A line for each animal, from the second on one for the sum so far, and the answer. `slips`:
    share of the lines whose result is off by one or two, which those below build on; the same in
    every process."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    random = Random(entry["question"])

    def result(right: int) -> int:
        return abs(right + random.choice((-2, -1, 1, 2))) if random.random() < slips else right

    lines: list[str] = []
    total = 0
    for animal, count in entry["metadata"]["animals"].items():
        legs = result(count * ANIMALS[animal])
        lines.append(f"{count} {animal}{'s' * (count > 1)}: {count}*{ANIMALS[animal]}={legs}")
        if len(lines) > 1:
            before, total = total, result(total + legs)
            lines.append(f"{before}+{legs}={total}")
        else:
            total = legs
    return "\n".join([*lines, f"Answer: {total}"])


def sloppy_solution(entry: Mapping[str, Any]) -> str:
    """The worked solution with slips: who imitates it knows how, and is often wrong."""
    return worked_solution(entry, slips=SLIPS)


def write_data(out: Path) -> None:
    """Write OUT/legs-train.parquet and OUT/legs-eval.parquet."""

    def problems(seed: int, size: int) -> Callable[[], Prepared]:
        return lambda: generated(TASK, ARGS, size=size, seed=seed, worked=sloppy_solution)

    prepare({name: problems(seed, size) for seed, (name, size) in enumerate(SIZES.items())}, out)
