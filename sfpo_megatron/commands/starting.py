"""What every command does first: load the config, check it, and see to the machine. No torch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.home import provide_home
from sfpo_megatron.host.torchrun import speaks


def load(arguments: argparse.Namespace, **check: Any) -> RunConfig:
    """The checked config of a command line; `check`: arguments of `check_config`."""
    config = load_config(arguments.config, arguments.overrides)
    check_and_warn(config, arguments.config, said=getattr(arguments, "launched", False), **check)
    return config


def check_and_warn(config: RunConfig, file: str, *, said: bool = False, **check: Any) -> None:
    """Check, and print the warnings once; `said`: the launcher has."""
    for warning in check_config(config, file=file, **check):
        if speaks() and not said:
            print(warning, file=sys.stderr)


def load_for_run(arguments: argparse.Namespace, **check: Any) -> RunConfig:
    """The config of a run that starts now, on this machine."""
    config = load(arguments, for_training=True, **check)
    see_to_home()
    return config


def see_to_home() -> None:
    """Provide a home folder where the machine has none, and say so."""
    said = provide_home()  # after `~` has been read
    if said is not None and speaks():
        print(f"warning: {said}", file=sys.stderr)
