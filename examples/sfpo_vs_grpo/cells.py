"""The cells of the study: what study.toml asks for, what is there, and what comes next.

results/TASK/ARM/lr-LR/seed-SEED.jsonl is one run: a first line with what it was (settings,
commit, hardware, how it ended), then its evaluations and train steps in few columns.
results/TASK/frozen.json has what was chosen from the tuning seeds; no confirming seed runs before
it is committed.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
FINAL_EVALS = 3
"""Evaluations whose mean is the final accuracy."""


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


@dataclass(kw_only=True, frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    about: Mapping[str, Any]
    """Its first line."""
    evals: tuple[tuple[int, float], ...]
    """(rollouts so far, held-out accuracy), from the warm start on."""
    train: tuple[Mapping[str, Any], ...]

    @property
    def score(self) -> float:
        """Held-out accuracy, averaged over the evaluations: by it the lr of an arm is chosen."""
        return mean(accuracy for _, accuracy in self.evals)

    @property
    def final(self) -> float:
        """The mean of the last evaluations; 0 of a run that broke off."""
        accuracies = [accuracy for _, accuracy in self.evals]
        return 0.0 if self.about["ended"] != "finished" else mean(accuracies[-FINAL_EVALS:])

    @property
    def broke(self) -> bool:
        """Whether it was stopped, or ended at less than half of its best."""
        return self.final < 0.5 * max(accuracy for _, accuracy in self.evals)

    def reached(self, threshold: float) -> float | None:
        """Rollouts until the accuracy was at `threshold`, between two evaluations in proportion;
        None if it never was."""
        before = None
        for rollouts, accuracy in self.evals:
            if accuracy >= threshold:
                if before is None:
                    return float(rollouts)
                share = (threshold - before[1]) / (accuracy - before[1])
                return before[0] + share * (rollouts - before[0])
            before = rollouts, accuracy
        return None


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
        if cell.file not in self._read and cell.file.exists():
            self._read[cell.file] = read(cell.file)
        return self._read.get(cell.file)

    def outcomes(self, task: str, arm: str, lr: float, seeds: Sequence[int]) -> list[Outcome]:
        """Those of the seeds that have run."""
        cells = [Cell(task=task, arm=arm, lr=lr, seed=seed) for seed in seeds]
        return [found for cell in cells if (found := self.outcome(cell)) is not None]

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
        """That of the best score over the tuning seeds."""
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
                name = "_".join(
                    f"{key.rpartition('.')[2]}-{value}" for key, value in changed.items()
                )
                arms[name] = {**base, **changed}
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


def frozen_file(task: str) -> Path:
    return RESULTS / task / "frozen.json"


def read(file: Path) -> Outcome:
    """A result; ValueError for a file that is none."""
    try:
        about, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise ValueError(
            f"{file}: found {error}, expected a line of JSON about the run, then one a step or an "
            "evaluation; restore the file, or remove it to run the cell again"
        ) from error
    return Outcome(
        about=about,
        evals=tuple((line["rollouts"], line["accuracy"]) for line in lines if "accuracy" in line),
        train=tuple(line for line in lines if "accuracy" not in line),
    )


COLUMNS = {
    "step": "step",
    "num_rollouts": "rollouts",
    "reward_mean": "reward",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "clip_frac": "clip_frac",
    "ppo_kl": "ppo_kl",
    "response_tokens_mean": "tokens",
    "num_skipped_steps": "skipped",
    "num_passes": "passes",
    "time/step_s": "step_s",
}
"""Columns of metrics.jsonl that a result keeps of a train step, and what they are called there."""


def trimmed(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl as a result has them."""
    rollouts = 0
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        if "eval/accuracy" in line:
            yield {"rollouts": rollouts, "accuracy": round(line["eval/accuracy"], 6)}
            continue
        rollouts = line["num_rollouts"]
        yield {new: _short(line[old]) for old, new in COLUMNS.items() if line.get(old) is not None}


def _short(value: float) -> float:
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.4g}")


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
