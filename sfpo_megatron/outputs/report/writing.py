"""Writes the report of runs into a file: which runs and arms, and where it may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sfpo_megatron.host.replacing import write_durably
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.report.arms import Arm, check_names, grouped, named
from sfpo_megatron.outputs.report.document import document_of
from sfpo_megatron.outputs.report.page import GENERATOR, page
from sfpo_megatron.outputs.report.reading import ReportError, Run, read_run, short_names

_HEAD_BYTES = 4096


def write_report(
    runs: Sequence[str],
    *,
    arms: Sequence[str] = (),
    target: float | None = None,
    out: str | None = None,
) -> Path:
    """Write the report of `runs`, each argument as the option of its name, and return its file.
    ReportError for what cannot be reported or written."""
    found, together = _runs_and_arms(runs, arms)
    file = _out(out, found)
    _write(file, page(document_of(found, together, target)))
    return file


def _runs_and_arms(paths: Sequence[str], given: Sequence[str]) -> tuple[list[Run], list[Arm]]:
    """The runs, those of `--arm` first, and their arms."""
    together = [_arm(text) for text in given]
    all_paths = [Path(path) for _, group in together for path in group] + [Path(p) for p in paths]
    if not all_paths:
        raise ReportError(
            "found no RUN, expected the output_dir of one run or more; give RUN or --arm"
        )
    real = [os.path.realpath(path) for path in all_paths]
    for path, there in zip(all_paths, real, strict=True):
        if real.count(there) > 1:
            raise ReportError(f"{path}: found this run twice, expected each once; leave one out")
    names = short_names(all_paths)
    runs = [read_run(path, name) for path, name in zip(all_paths, names, strict=True)]
    arms, first = [], 0
    for name, group in together:
        arms.append(named(name, range(first, first + len(group)), runs))
        first += len(group)
    arms += grouped(runs[first:], first)
    check_names(arms)
    return runs, arms


def _arm(text: str) -> tuple[str, list[str]]:
    """NAME and the runs of one `--arm`."""
    name, _, listed = text.partition("=")
    group = [path for path in listed.split(",") if path]
    if not (name.strip() and group):
        raise ReportError(f"--arm: found {text!r}, expected NAME=RUN,RUN; give a name and its runs")
    return name.strip(), group


def _out(given: str | None, runs: Sequence[Run]) -> Path:
    """The file to be written. ReportError if it is somebody else's, or there is no place for it."""
    if given is not None:
        out = Path(given)
    else:
        out = RunDirectory(runs[0].path).report if len(runs) == 1 else Path("report.html")
    if not out.parent.is_dir():
        raise ReportError(f"{out}: found no directory {out.parent}, expected one; make it first")
    if out.exists():
        is_ours = False
        if out.is_file():
            with out.open("rb") as file:
                is_ours = f'content="{GENERATOR}"'.encode() in file.read(_HEAD_BYTES)
        if not is_ours:
            raise ReportError(
                f"{out}: found what `sfpo-megatron report` has not written, expected an earlier "
                "report or nothing; choose another --out, or move it away"
            )
    return out


def _write(out: Path, text: str) -> None:
    try:
        write_durably(out, text)
    except OSError as error:
        raise ReportError(
            f"{out}: found that it cannot be written ({error.strerror}), expected a place with "
            "room; choose another --out"
        ) from error
