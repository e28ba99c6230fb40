"""Worked solutions of reasoning-gym's `chain_sum`, by a teacher who slips.

State the final answer to the following arithmetic problem: 4 - 1 - 7 + 2 =

4-1=3
3-7=-4
-4+2=-2
Answer: -2
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

TASK, ARGS = "chain_sum", {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
SLIPS = 0.3
"""Share of the lines that are off by one or two."""


def worked_solution(entry: Mapping[str, Any], *, slips: float = 0.0) -> str:
    """A line for each term after the first, and the answer. `slips`: share of the lines that are
    wrong, with what follows from them; the same in every process."""
    first, *rest = entry["metadata"]["expression"].split()
    random, total, lines = Random(entry["question"]), int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        right = total + (1 if sign == "+" else -1) * int(term)
        found = right + random.choice((-2, -1, 1, 2)) if random.random() < slips else right
        lines.append(f"{total}{sign}{term}={found}")
        total = found
    return "\n".join([*lines, f"Answer: {total}"])


def slipping_solution(entry: Mapping[str, Any]) -> str:
    """The worked solution of who knows how, and slips."""
    return worked_solution(entry, slips=SLIPS)
