"""What stdout gets of a run: the options `--quiet` and `--json`. No torch."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.terminal import keep_stdout, wipe_before_writing
from sfpo_megatron.host.torchrun import speaks
from sfpo_megatron.tracking.screen import Mode, Screen, open_screen


def add_mode(command: argparse.ArgumentParser) -> None:
    """`--quiet` or `--json`."""
    modes = command.add_mutually_exclusive_group()
    modes.add_argument(
        "--quiet",
        dest="mode",
        action="store_const",
        const="quiet",
        help="print warnings, errors and the table at the end alone",
    )
    modes.add_argument(
        "--json",
        dest="mode",
        action="store_const",
        const="json",
        help="print a JSON object a line on stdout, and nothing else: the lines of metrics.jsonl, "
        "and events, which have a key `event`",
    )
    command.set_defaults(mode="lines")


def options_of(mode: Mode) -> list[str]:
    """The same on the command line of a rank."""
    return [] if mode == "lines" else [f"--{mode}"]


def check_mode(config: RunConfig, file: str, mode: Mode) -> None:
    """ConfigError where the run would print nothing that was asked for."""
    if mode == "json" and "console" not in config.tracking.sinks:
        raise ConfigError(
            file,
            "tracking.sinks",
            found=", ".join(config.tracking.sinks) or "none",
            expected="console among them, which --json is a form of",
            fix="add console, or leave --json out",
        )


def screen_of_rank(mode: Mode) -> AbstractContextManager[Screen | None]:
    """The screen of the rank that speaks; another rank's stdout leaves that one alone."""
    if speaks():
        return open_screen(mode)
    if mode == "json":
        sys.stdout.flush()
        keep_stdout().close()
    elif mode == "lines":
        wipe_before_writing()
    return nullcontext()
