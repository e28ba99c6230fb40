"""What the files of a RUN say, read while the run may be writing them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sfpo_megatron.config.load import ConfigError, dump_config, load_config
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.json_lines import read_lines
from sfpo_megatron.outputs.metrics import RunMetrics, read_metrics


class ReportError(ValueError):
    """A report cannot be made: what was found, what was expected, what to do."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Run:
    """One run, as far as its files go; what is not there is empty."""

    name: str
    """A short name that no other run of the report has."""
    path: Path
    metrics: RunMetrics
    config: dict[str, Any]
    settings: dict[str, str]
    """Every setting as dotted key -> JSON, with this version's defaults: an earlier one's runs
    compare with its own."""
    record: dict[str, Any]
    """The content of run.json: id, start, kind."""
    starts: tuple[dict[str, Any], ...]
    """Lines of environment.jsonl of this run, the oldest first."""
    samples: tuple[dict[str, Any], ...]
    evaluated: dict[str, Any]
    """The content of eval/results.json: figures of `sfpo-megatron eval`."""

    @property
    def num_steps(self) -> int | None:
        """Train steps that it is to make; None where the config does not say."""
        steps = setting(self.config, "train.num_steps")
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        """Train step of its last line, 0 before the first."""
        return int(self.metrics.train[-1]["step"]) if self.metrics.train else 0


def setting(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key of a plain config; None where it has none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_run(path: Path, name: str) -> Run:
    """Read the RUN at `path`. ReportError where there is none, or a file of it cannot be read."""
    directory = RunDirectory.of(path)
    if not (directory.config.is_file() or directory.metrics.is_file()):
        found = "neither config.yaml nor metrics.jsonl" if path.is_dir() else "no such directory"
        raise ReportError(
            f"{path}: found {found}, expected the output_dir of a run; give the directory that "
            "`sfpo-megatron train` wrote"
        )
    record, config = _object(directory.record), _config(directory.config)
    if record.get("kind") == "sft":
        raise ReportError(
            f"{path}: found a warm start (sft), expected a run of `sfpo-megatron train`; its loss "
            "is in metrics.jsonl"
        )
    return Run(
        name=name,
        path=directory.path,
        metrics=_metrics(directory.metrics),
        config=config,
        settings=_settings(directory.config, config),
        record=record,
        starts=tuple(
            line
            for line in _lines(directory.environment)
            if line.get("run_id") == record.get("run_id")
        ),
        samples=tuple(_lines(directory.samples)),
        evaluated=_object(directory.eval / "results.json"),
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without what they have in common at their beginning."""
    full = [Path(os.path.abspath(path)) for path in paths]
    if len(full) == 1:
        return [full[0].name]
    common = Path(os.path.commonpath(full))
    return [path.name if path == common else str(path.relative_to(common)) for path in full]


def _metrics(file: Path) -> RunMetrics:
    if not file.is_file():
        return RunMetrics(train=(), evals=())
    try:
        return read_metrics(file, is_written=True)
    except ValueError as error:
        raise ReportError(str(error)) from error


def _config(file: Path) -> dict[str, Any]:
    """A plain tree, not a `RunConfig`: an older version's config is read too."""
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ReportError(
            f"{file}: found what is no YAML ({why}), expected the config as the run wrote it; "
            "restore it, or move it away to report without it"
        ) from error
    return found if isinstance(found, dict) else {}


def _settings(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    try:
        return _flat(yaml.safe_load(dump_config(load_config(file))))
    except ConfigError:  # no config, or one that this version would not take
        return _flat(config)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Each setting of a plain config; a list is one value."""
    found: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{key}.")
        else:
            found[key] = json.dumps(value, default=str, ensure_ascii=False)
    return found


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(
            f"{file}: found {error}, expected JSON; move it away to report without it"
        ) from error
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return [line.content for line in read_lines(file, is_written=True)]
    except ValueError as error:
        raise ReportError(str(error)) from error
