"""`sfpo-megatron report RUN [RUN ...]`: one HTML file from what runs have written.

It reads files alone, also of runs that go on; no torch, and nothing beside PyYAML.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.outputs.directory import RunDirectory

if TYPE_CHECKING:
    from sfpo_megatron.outputs.report.arms import Arm
    from sfpo_megatron.outputs.report.reading import Run

_HEAD_BYTES = 4096


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    command.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="output_dir of a run, ended or not; runs that differ in the seed alone are one arm",
    )
    command.add_argument(
        "--arm",
        metavar="NAME=RUN,RUN",
        action="append",
        default=[],
        help="put these runs together as one arm of that name; may be repeated",
    )
    command.add_argument(
        "--target",
        type=_share,
        metavar="ACCURACY",
        help="held-out accuracy, such as 0.8, whose cost is compared; default: nine tenths of the "
        "gain that half of the seeds of every arm make",
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html in RUN, of several runs in the working directory",
    )


def _share(given: str) -> float:
    """Read `--target`."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"found {given!r}, expected a share above 0 and up to 1, such as 0.8"
        )
    return value


def report(arguments: argparse.Namespace) -> int:
    """Write the report; the exit code: 0, or 2 for what cannot be reported or written."""
    from sfpo_megatron.outputs.report.reading import ReportError

    try:
        out = write_report(
            arguments.runs, arms=arguments.arm, target=arguments.target, out=arguments.out
        )
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(out)
    return 0


def write_report(
    runs: Sequence[str],
    *,
    arms: Sequence[str] = (),
    target: float | None = None,
    out: str | None = None,
) -> Path:
    """Write the report of `runs`, each argument as the option of its name, and return its file.
    ReportError for what cannot be reported or written."""
    from sfpo_megatron.outputs.report.document import document_of
    from sfpo_megatron.outputs.report.page import page

    found, grouped = _runs_and_arms(runs, arms)
    file = _out(out, found)
    _write(file, page(document_of(found, grouped, target)))
    return file


def _runs_and_arms(paths: Sequence[str], given: Sequence[str]) -> tuple[list[Run], list[Arm]]:
    """The runs, those of `--arm` first, and their arms."""
    from sfpo_megatron.outputs.report.arms import check_names, grouped, named
    from sfpo_megatron.outputs.report.reading import ReportError, read_run, short_names

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
    from sfpo_megatron.outputs.report.reading import ReportError

    name, _, listed = text.partition("=")
    group = [path for path in listed.split(",") if path]
    if not (name.strip() and group):
        raise ReportError(f"--arm: found {text!r}, expected NAME=RUN,RUN; give a name and its runs")
    return name.strip(), group


def _out(given: str | None, runs: Sequence[Run]) -> Path:
    """The file to be written. ReportError if it is somebody else's, or there is no place for it."""
    from sfpo_megatron.outputs.report.page import GENERATOR
    from sfpo_megatron.outputs.report.reading import ReportError

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
    from sfpo_megatron.checkpoints.manifest import write_durably
    from sfpo_megatron.outputs.report.reading import ReportError

    try:
        write_durably(out, text)
    except OSError as error:
        raise ReportError(
            f"{out}: found that it cannot be written ({error.strerror}), expected a place with "
            "room; choose another --out"
        ) from error
