"""Records of an evaluation: a line for each rollout, which are also its state.

    DIR/settings.json    what the records were made with; others are refused
    DIR/records.jsonl    problem after problem, each with all of its samples

A problem is there with all its samples or not at all, so that an evaluation that was killed goes on
with the first one that is missing. No torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, TypeAlias

from sfpo_megatron.host.replacing import set_aside, write_durably
from sfpo_megatron.outputs.aside import one_writer
from sfpo_megatron.outputs.owned import NotOurs
from sfpo_megatron.types import Json

SETTINGS = "settings.json"
DATE = "date"
"""Key of the settings: the time that the chat template has printed."""
PATIENCE_S = 20.0
"""How long a directory that another process holds is tried again."""
_POLL_S = 0.1

Record: TypeAlias = dict[str, Any]
"""problem, source, sample, question, reference, text, reward, correct, answer, parts, num_tokens,
truncated: docs/evaluation.md describes each."""
_FIGURES: Mapping[str, tuple[type, ...]] = {
    "source": (str,),
    "reward": (int, float),
    "correct": (bool,),
    "answer": (str, NoneType),
    "parts": (dict,),
    "num_tokens": (int,),
    "truncated": (bool,),
}
"""Fields that the figures are made of, and the types of their values."""


class EvaluationError(ValueError):
    """An evaluation cannot begin or go on: what was found, what was expected, what to do."""


def _is(value: Json, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def settings_in(directory: Path) -> dict[str, Any] | None:
    """What the records of a directory were made with; None where there are none. EvaluationError
    for a file that says nothing."""
    path = directory / SETTINGS
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path}: found {error}, expected an object of JSON; move it away"
        ) from error


class Records:
    """The records of one model; one process at a time."""

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], *, n: int, fresh: bool = False
    ) -> None:
        """Open or begin; `fresh` sets aside what is there. EvaluationError if another process
        writes there, or if what is there was made with other settings."""
        self._directory = directory
        self._settings = json.loads(json.dumps(settings))
        self._n, self._fresh = n, fresh
        self._held = ExitStack()
        self.previous: Path | None = None
        """The folder of the earlier records, set aside by `fresh`."""
        self.problems: dict[str, list[Record]] = {}
        """Problem id -> its samples, in order."""

    def __enter__(self) -> Records:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opening:
            opening.enter_context(self._alone())
            # Not before: another evaluation may be at work there.
            if self._fresh and self._directory.exists():
                self.previous = set_aside(self._directory, "previous")
            self._directory.mkdir(exist_ok=True)
            self._check_settings()
            self._read()
            file = (self._directory / "records.jsonl").open("a", encoding="utf-8")
            self._file = opening.enter_context(file)
            self._held = opening.pop_all()
        return self

    def _alone(self) -> ExitStack:
        """Hold the directory; what is left of an evaluation that was killed is waited for."""
        held, deadline = ExitStack(), time.monotonic() + PATIENCE_S
        while True:
            try:
                held.enter_context(one_writer(self._directory, self._directory.resolve()))
                return held
            except NotOurs as error:
                if time.monotonic() >= deadline:
                    raise EvaluationError(
                        f"{self._directory}: found another evaluation at work there, expected "
                        "none; wait for it, or choose another --out"
                    ) from error
            time.sleep(_POLL_S)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def add(self, records: Sequence[Record]) -> None:
        """Keep all samples of some problems; they are on the disk when this returns."""
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(records)

    def require_figures(self) -> None:
        """EvaluationError naming a sample that lacks a field of the figures: one of an earlier
        version, or edited. Evaluating all that is missing would otherwise come before it."""
        for problem, samples in self.problems.items():
            for one in samples:
                wrong = [
                    name for name, kinds in _FIGURES.items() if not _is(one.get(name, ...), kinds)
                ]
                if wrong:
                    raise EvaluationError(
                        f"{self._directory / 'records.jsonl'}: found sample {one['sample']} of "
                        f"problem {problem!r} without a usable {', '.join(wrong)}, expected a "
                        "record as this version writes it; restore the line, or set the records "
                        "aside with --fresh"
                    )

    def _take(self, records: Sequence[Record]) -> None:
        for problem, samples in groupby(records, key=lambda record: record["problem"]):
            self.problems[str(problem)] = list(samples)

    def _check_settings(self) -> None:
        then = settings_in(self._directory)
        if then is None:
            text = json.dumps(self._settings, indent=1) + "\n"
            write_durably(self._directory / SETTINGS, text)
        elif found := list(self._differences(then)):
            raise EvaluationError(
                f"{self._directory}: found records made with {' and '.join(found)}, expected "
                "the same settings; choose another --out, or set them aside with --fresh"
            )

    def _differences(self, then: Mapping[str, Any]) -> Iterator[str]:
        """How the settings of the records differ, those apart that their version did not keep."""
        # The date is in the prompts, and versions before did not keep it.
        now = {key: value for key, value in self._settings.items() if key != DATE}
        changed = sorted(k for k in then if k != DATE and then[k] != now.get(k))
        if changed:
            what = ", ".join(f"{k} {then[k]!r} -> {now.get(k)!r}" for k in changed)
            yield f"other settings ({what})"
        if unknown := sorted(now.keys() - then.keys()):
            yield f"unknown settings (their version did not record {', '.join(unknown)})"

    def _read(self) -> None:
        """Take in whole problems, and leave only them in the file: a killed evaluation may have
        left a part of one."""
        path = self._directory / "records.jsonl"
        if not path.exists():
            return
        records: list[Record] = []
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[:-1]:  # `splitlines` ends one at U+2028 too
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None  # torn by a crash of the machine
            if isinstance(record, dict) and {"problem", "sample", "correct"} <= record.keys():
                records.append(record)
        self._take(records)
        whole = {
            problem: samples
            for problem, samples in self.problems.items()
            if [sample["sample"] for sample in samples] == list(range(self._n))
        }
        self.problems = whole
        kept = "".join(json.dumps(r) + "\n" for samples in whole.values() for r in samples)
        if kept != text:
            write_durably(path, kept)
