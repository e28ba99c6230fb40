"""The cells of the study: what study.toml asks for, what is there, and what comes next.

results/TASK/ARM/lr-LR/seed-SEED.jsonl is one run (saved.py).
results/TASK/frozen.json has what was chosen from the tuning seeds; no confirming seed runs before
it is committed.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from saved import Outcome, read

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(kw_only=True, frozen=True, slots=True)
class Cell:
    """One run."""

    task: str
    arm: str
    lr: float
    seed: int

    @property
    def file(self) -> Path:
        """The file of its result, which may not be there."""
        return RESULTS / self.task / self.arm / f"lr-{self.lr:g}" / f"seed-{self.seed}.jsonl"


class Study:
    """study.toml and the results that are there."""

    def __init__(self, file: Path = HERE / "study.toml") -> None:
        self.settings: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        self._read: dict[Path, Outcome] = {}

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        return self.settings["tasks"]

    @property
    def arms(self) -> Mapping[str, Mapping[str, Any]]:
        return self.settings["arms"]

    def outcome(self, cell: Cell) -> Outcome | None:
        """The result of a cell, None if it has not run."""
        return self._of(cell.file) if cell.file.exists() else None

    def _of(self, file: Path) -> Outcome:
        if file not in self._read:
            self._read[file] = read(file)
        return self._read[file]

    def outcomes(self, task: str, arm: str, lr: float, seeds: Sequence[int]) -> list[Outcome]:
        """Those of the seeds that have run."""
        cells = [Cell(task=task, arm=arm, lr=lr, seed=seed) for seed in seeds]
        return [found for cell in cells if (found := self.outcome(cell)) is not None]

    def everything(self, task: str) -> list[Outcome]:
        """All results of a task."""
        files = sorted((RESULTS / task).glob("*/lr-*/seed-*.jsonl"))
        return [self._of(file) for file in files]

    def lrs(self, task: str, arm: str) -> list[float]:
        """Learning rates to try: the first ones, and one more at an end that is the best so far."""
        lrs, seeds = sorted(self.settings["first_lrs"]), self.settings["tuning_seeds"]
        while True:
            scores = {}
            for lr in lrs:
                found = self.outcomes(task, arm, lr, seeds)
                if len(found) < len(seeds):
                    return lrs
                scores[lr] = mean(one.score for one in found)
            best = max(scores, key=lambda lr: scores[lr])
            if best == lrs[0]:
                lrs.insert(0, _rounded(lrs[0] / 2))
            elif best == lrs[-1]:
                lrs.append(_rounded(lrs[-1] * 2))
            else:
                return lrs

    def best_lr(self, task: str, arm: str) -> float:
        """Setting of the best score over the tuning seeds."""
        seeds = self.settings["tuning_seeds"]
        return max(
            self.lrs(task, arm),
            key=lambda lr: mean(one.score for one in self.outcomes(task, arm, lr, seeds)),
        )

    def tuning(self, task: str) -> list[Cell]:
        """Cells that are still to be run before the task can be frozen."""
        return _not_run(
            Cell(task=task, arm=arm, lr=lr, seed=seed)
            for arm in self.arms
            for lr in self.lrs(task, arm)
            for seed in self.settings["tuning_seeds"]
        )

    def confirming(self, task: str) -> list[Cell]:
        """Cells of fresh seeds at each arm's frozen lr that have not run; seeds are paired, so all
        arms of one come before the next."""
        return _not_run(
            Cell(task=task, arm=arm, lr=lr, seed=seed)
            for seed in self.confirming_seeds(task)
            for arm, lr in self.frozen(task)["lrs"].items()
        )

    def ablating(self) -> list[Cell]:
        """Cells of the ablations that have not run, at the frozen lr of what they change."""
        ablations = self.settings["ablations"]
        task, lr = ablations["task"], self.frozen(ablations["task"])["lrs"][ablations["of"]]
        return _not_run(
            Cell(task=task, arm=arm, lr=lr, seed=seed)
            for arm in self.ablation_arms()
            for seed in ablations["seeds"]
        )

    def forking(self) -> list[Cell]:
        """Cells with a gate that have not run, at the frozen lr of the arm without it."""
        gates = self.settings["gates"]
        task, lr = gates["task"], self.frozen(gates["task"])["lrs"][gates["of"]]
        return _not_run(
            Cell(task=task, arm=self.gate_arm(rule), lr=lr, seed=seed)
            for rule in gates["forks"]
            for seed in self.fork_seeds(task)
        )

    def ablation_arms(self) -> dict[str, dict[str, Any]]:
        """Name -> what it changes: each point of the grids."""
        ablations = self.settings["ablations"]
        base, arms = self.arms[ablations["of"]], {}
        for grid in ablations["grids"]:
            for values in itertools.product(*grid.values()):
                changed = dict(zip(grid, values, strict=True))
                arms[point_name(changed)] = {**base, **changed}
        return arms

    def gate_rules(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> settings of each gate that is looked at."""
        return self.settings["gates"]["rules"]

    def gate_arm(self, rule: str) -> str:
        """Name of the arm that really runs with it."""
        return f"gate_{rule}"

    def fork_seeds(self, task: str) -> list[int]:
        return self.confirming_seeds(task)[: self.settings["gates"]["fork_seeds"]]

    def settings_of(self, arm: str) -> Mapping[str, Any]:
        """What an arm changes in its task's config."""
        gated = {self.gate_arm(rule): settings for rule, settings in self.gate_rules().items()}
        if arm in gated:
            base = self.arms[self.settings["gates"]["of"]]
            return {**self.settings["common"], **base, **gated[arm]}
        own = self.arms[arm] if arm in self.arms else self.ablation_arms()[arm]
        return {**self.settings["common"], **own}

    def confirming_seeds(self, task: str) -> list[int]:
        first = self.settings["first_confirming_seed"]
        return list(range(first, first + self.tasks[task]["confirming_seeds"]))

    def frozen(self, task: str) -> dict[str, Any]:
        """What was chosen from the tuning seeds; empty while that is still to be done."""
        file = frozen_file(task)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def freeze(self, task: str) -> dict[str, Any]:
        """Choose lrs and threshold from the tuning seeds, which all have run."""
        lrs = {arm: self.best_lr(task, arm) for arm in self.arms}
        seeds = self.settings["tuning_seeds"]
        final = mean(one.final for one in self.outcomes(task, "grpo", lrs["grpo"], seeds))
        threshold = round(self.settings["threshold"] * final, 4)
        return {"lrs": lrs, "grpo_final": round(final, 4), "threshold": threshold}


def _not_run(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.file.exists()]


def point_name(changed: Mapping[str, Any]) -> str:
    """Name of the arm that changes these settings: a point of a grid."""
    return "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in changed.items())


def timing_file(task: str) -> Path:
    return RESULTS / task / "timing.json"


def frozen_file(task: str) -> Path:
    return RESULTS / task / "frozen.json"


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
