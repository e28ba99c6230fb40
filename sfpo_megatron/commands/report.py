"""`sfpo-megatron report RUN [RUN ...]`: one HTML file from what runs have written.

It reads files alone, also of runs that go on; no torch, and nothing beside PyYAML.
"""

from __future__ import annotations

import argparse
import math
import sys

from sfpo_megatron.config.paths import from_option


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
        type=_arm,
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
        type=from_option,
        metavar="FILE",
        help="default: report.html in RUN, of several runs in the working directory",
    )


def _arm(given: str) -> str:
    """`--arm`, in each of whose paths `~` may stand."""
    name, equals, listed = given.partition("=")
    return f"{name}{equals}{','.join(from_option(path) for path in listed.split(',') if path)}"


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
    from sfpo_megatron.outputs.report.writing import write_report

    try:
        out = write_report(
            arguments.runs, arms=arguments.arm, target=arguments.target, out=arguments.out
        )
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(out)
    return 0
