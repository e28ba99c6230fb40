"""`sfpo-megatron check`: validates a config, reads its sources with `--data`; starts nothing."""

from __future__ import annotations

import argparse
import sys

from sfpo_megatron.checkpoints.identity import outlook
from sfpo_megatron.checkpoints.store import CheckpointError, store_of
from sfpo_megatron.commands.starting import load
from sfpo_megatron.config.load import ConfigError, dump_config
from sfpo_megatron.config.origin import COMMAND_LINE
from sfpo_megatron.errors import may_pass
from sfpo_megatron.host.torchrun import speaks


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `check` alone."""
    command.add_argument(
        "--data",
        action="store_true",
        help="read every source with the model's tokenizer, and print in place of the config what "
        "a run would find: rows, repeats, bad rows, lengths, the first prompt of each",
    )
    command.add_argument(
        "--json", action="store_true", help="with --data: print one object, nothing else on stdout"
    )


def check(arguments: argparse.Namespace) -> int:
    """Check, and print; the exit code: 2, too, where `train` would refuse what is in output_dir."""
    if arguments.json and not arguments.data:
        raise ConfigError(
            COMMAND_LINE,
            "--json",
            found="no --data beside it",
            expected="--data: the config itself is printed as YAML",
            fix="add --data, or remove --json",
        )
    ranks = arguments.world_size
    config = load(arguments, world_size=ranks, for_training=ranks is not None)
    code = 0
    if arguments.data:
        from sfpo_megatron.commands.check_data import check_data

        if code := check_data(config, as_json=arguments.json):
            return code  # whichever run it would be, it does not start
    else:
        print(dump_config(config), end="")
    try:
        outcome = outlook(config, store_of(config), fresh=arguments.fresh)
    except CheckpointError as error:
        outcome, code = f"is refused: {error}", 1 if may_pass(error) else 2
    if speaks():
        print(f"train {outcome}", file=sys.stderr)
    return code
