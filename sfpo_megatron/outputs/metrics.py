"""A run's metrics.jsonl, read back: train lines and evaluation lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.outputs.json_lines import bad_line, read_lines
from sfpo_megatron.types import Json

_HIGHEST = 1e100
_EXPECTED = "a JSON object with a step, which is a whole number as num_rollouts is"


@dataclass(kw_only=True, frozen=True, slots=True)
class RunMetrics:
    """The lines of one run, in step order. A step that was logged twice (by a resumed run) counts
    as it was logged last."""

    train: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]

    @property
    def gate_close_step(self) -> int | None:
        """First train step without SFPO after one with it."""
        was_active = False
        for line in self.train:
            active = line.get("sfpo_active")
            if was_active and active is not None and not active:
                return int(line["step"])
            was_active = was_active or bool(active)
        return None

    def series(self, name: str, lines: tuple[dict[str, Any], ...]) -> list[tuple[int, float]]:
        """(step, value) of the lines that have a number."""
        return [(line["step"], line[name]) for line in lines if is_number(line.get(name))]

    def rollouts_at(self, step: int) -> int:
        """Rollouts used up to and including `step` (0 before the first)."""
        before = [x["num_rollouts"] for x in self.train if x["step"] <= step]
        return int(before[-1]) if before else 0


def read_metrics(path: str | Path, *, is_written: bool = False) -> RunMetrics:
    """Read a metrics.jsonl; ValueError names the line that is not JSON or has no step.
    `is_written`: a run may be writing it; half a line at its end is left out."""
    train: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    for where, text, line in read_lines(path, expected=_EXPECTED, is_written=is_written):
        step = line.get("step")
        if type(step) is not int or type(line.get("num_rollouts", 0)) is not int:
            raise bad_line(where, text, _EXPECTED)
        if "eval/accuracy" in line:
            evals[step] = line
        if "num_rollouts" in line and ("loss" in line or "reward_mean" in line):
            train[step] = line
    return RunMetrics(
        train=tuple(train[step] for step in sorted(train)),
        evals=tuple(evals[step] for step in sorted(evals)),
    )


def is_number(found: Json) -> TypeGuard[float]:
    """Whether a value of a line is a number that can be squared and summed; a boolean is none."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return abs(found) < _HIGHEST


def cut_metrics(path: str | Path, step: int) -> None:
    """Drop the lines after train step `step`, which a run that continues from there writes again,
    and half a line at the end. A missing file is no error."""
    file = Path(path)
    if not file.exists():
        return
    kept = []
    # Bytes: what is no UTF-8 costs its own line alone, and U+2028 in a text ends none.
    for text in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # a killed run may leave half a line
        at = line.get("step") if isinstance(line, dict) else None
        # A line without a train step is nobody's here, and `read_metrics` would end on it.
        if text.endswith(b"\n") and type(at) is int and at <= step:
            kept.append(text)
    with replacing(file) as aside:
        aside.write_bytes(b"".join(kept))
