"""What is said of a metric where it is declared, and which keys of a line are declared at all.

In a name `pass_k` stands for each pass, from 1 to K + 1, and a word in capitals for a name that the
config or your own code gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of a line."""

    name: str
    unit: str
    meaning: str
    when: str = ""
    """What a run, or a line, has to have; empty where every one has the key. Markdown, as the
    meaning is."""

    def matches(self, key: str) -> bool:
        """Whether a key of a line is this metric."""
        form = re.escape(self.name).replace("pass_k", r"pass_[1-9]\d*")
        return re.fullmatch(re.sub(r"[A-Z]+", ".+", form), key) is not None


def is_metric_name(name: object) -> TypeGuard[str]:
    """Whether what a user's own code calls a number can be written wherever metrics are."""
    return isinstance(name, str) and name != "" and name.isprintable()


def undeclared(keys: Iterable[str], metrics: Iterable[Metric]) -> set[str]:
    """The keys of a line that are none of these metrics."""
    declared = tuple(metrics)
    return {key for key in keys if not any(metric.matches(key) for metric in declared)}


def table(metrics: Iterable[Metric]) -> str:
    """The metrics as a table in Markdown."""
    rows = ["| Key | Unit | Meaning | Only with |", "|---|---|---|---|"]
    for metric in metrics:
        cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.when)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)
