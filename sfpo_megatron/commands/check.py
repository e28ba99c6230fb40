"""`sfpo-megatron check`: validates a config, reads its sources with `--data`; starts nothing."""

from __future__ import annotations

import argparse
import sys

from sfpo_megatron.checkpoints.identity import outlook
from sfpo_megatron.checkpoints.store import CheckpointError, store_of
from sfpo_megatron.commands.starting import load
from sfpo_megatron.config.load import ConfigError, dump_config
from sfpo_megatron.config.origin import COMMAND_LINE
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.torchrun import speaks
from sfpo_megatron.outputs.directory import RunDirectory


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
    """Check, and print; the exit code."""
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

        code = check_data(config, as_json=arguments.json)
    else:
        print(dump_config(config), end="")
    if speaks():
        print(f"train {_outlook(config, fresh=arguments.fresh)}", file=sys.stderr)
    return code


def _outlook(config: RunConfig, *, fresh: bool) -> str:
    try:
        return outlook(
            RunDirectory.of(config.output_dir),
            store_of(config),
            resume=config.checkpoint.resume,
            fresh=fresh,
        )
    except CheckpointError as error:
        return f"is refused: {error}"
