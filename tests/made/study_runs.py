"""Results of the study in examples/sfpo_vs_grpo as tests make them up, and its modules.

The study's modules are scripts beside one another: they are found by `sys.path`.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples/sfpo_vs_grpo"
NAMES = (
    *(
        "budget",
        "cells",
        "costs",
        "gates",
        "pairs",
        "pictures",
        "results",
        "saved",
        "study",
        "sums",
    ),
    *("tables", "timing"),
)


def study_modules(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, ModuleType]]:
    """The study's modules by name, with their results in `results`; for a fixture."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    found = {name: importlib.import_module(name) for name in NAMES}
    monkeypatch.setattr(found["cells"], "RESULTS", results)
    yield found
    for name in NAMES:
        sys.modules.pop(name, None)


def leave(
    cell: Any,
    accuracies: list[float],
    *,
    ended: str = "finished",
    rise: int = 1000,
    step_s: float = 1.0,
    first_s: float | None = None,
    commit: str = "0123456789",
    hardware: str = "2 cores",
) -> None:
    """The result of a run with 128 rollouts a step and an evaluation every second step, whose
    entropy is 1 before step `rise` and then 2; the first step takes `first_s`, if given."""
    lines: list[dict[str, Any]] = [
        {
            "settings": {"sfpo.num_fast_passes": 0},
            "ended": ended,
            "seconds": 60.0,
            "commit": commit,
            "hardware": hardware,
        },
        {"rollouts": 0, "accuracy": accuracies[0]},
    ]
    for index, accuracy in enumerate(accuracies[1:]):
        for step in (2 * index + 1, 2 * index + 2):
            line = {"step": step, "rollouts": 128 * step, "tokens": 4.0, "passes": 4}
            took_s = first_s if step == 1 and first_s else step_s
            lines.append({**line, "step_s": took_s, "entropy": 2.0 if step >= rise else 1.0})
        lines.append({"rollouts": 256 * (index + 1), "accuracy": accuracy})
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    cell.file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def tune(cells: ModuleType, *, best: float) -> list[float]:
    """Run the tuning of all arms of aiw on made-up scores with their best at `best`; every lr that
    was tried."""
    tried = set()
    while missing := cells.Study().tuning("aiw"):
        for cell in missing:
            score = 0.9 - 0.1 * abs(math.log2(cell.lr / best))
            leave(cell, [0.1, score, score, score])
            tried.add(cell.lr)
    return sorted(tried)


def confirm(cells: ModuleType, **others: Any) -> None:
    """Tuning and confirming runs of aiw: SFPO needs half of the rollouts, and twice the seconds for
    each after a first step that is as long in all arms."""
    tune(cells, best=4e-4)
    cells.frozen_file("aiw").write_text(json.dumps(cells.Study().freeze("aiw")))
    for cell in cells.Study().confirming("aiw"):
        if cell.arm == "sfpo":
            leave(cell, [0.0, 0.81, 0.9, 0.9, 0.9], step_s=2.0, first_s=50.0, **others)
        else:
            leave(cell, [0.0, 0.405, 0.81, 0.9, 0.9], first_s=50.0)
