"""The file of one run of the study, written and read.

Its first line says what the run was (settings, commit, hardware, how it ended); its evaluations
and train steps follow in few columns. A file is committed, and stays below `LIMIT_BYTES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

FINAL_EVALS = 3
"""Evaluations whose mean is the final accuracy."""
LIMIT_BYTES = 50_000
"""A file is shorter than this."""
ALWAYS = ("step", "entropy")
"""Columns that every train step has, also where the others would make the file too long: steps are
counted, and gates are replayed on all entropies."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    about: Mapping[str, Any]
    """Its first line."""
    evals: tuple[tuple[int, float], ...]
    """(rollouts so far, held-out accuracy), from the warm start on."""
    train: tuple[Mapping[str, Any], ...]
    """A line for each train step; in a long run only every k-th has more columns than `ALWAYS`, the
    first among them."""

    @property
    def measured(self) -> tuple[Mapping[str, Any], ...]:
        """Train steps with all their columns."""
        return tuple(line for line in self.train if "step_s" in line)

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


def read(file: Path) -> Outcome:
    """A result; ValueError for a file that is none."""
    try:
        about, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise ValueError(
            f"{file}: found {error}, expected a line of JSON about the run, then one a step or an "
            "evaluation; restore the file, or remove it to run the cell again"
        ) from error
    return outcome(about, lines)


def outcome(about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Outcome:
    """A run of these lines of evaluations and train steps."""
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


def write(file: Path, about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a result, shorter than `LIMIT_BYTES`: where it is not, only every second, third, ...
    train step keeps all its columns. ValueError where even that is too long."""
    head, whole = _json(about), [_json(line) for line in lines]
    text = [_json(_shortened(line)) for line in lines]
    steps = [place for place, line in enumerate(lines) if "accuracy" not in line]
    room = LIMIT_BYTES - 1 - len(head) - sum(map(len, text))
    for each in range(1, max(len(steps), 1) + 1):
        if sum(len(whole[place]) - len(text[place]) for place in steps[::each]) <= room:
            break
    else:
        raise ValueError(
            f"{file}: found {len(steps)} train steps, expected so few that their entropies alone "
            f"stay below {LIMIT_BYTES:,} bytes; make the run shorter"
        )
    for place in steps[::each]:
        text[place] = whole[place]
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    aside.write_text(head + "".join(text), encoding="utf-8")
    aside.rename(file)


def _json(line: Mapping[str, Any]) -> str:
    """In ASCII: a character is a byte."""
    return json.dumps(line) + "\n"


def _shortened(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is always kept of a line."""
    if "accuracy" in line:
        return line
    return {name: line[name] for name in ALWAYS if name in line}


def _short(value: float) -> float:
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.4g}")
