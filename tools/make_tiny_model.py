"""Make a small random model directory, with a tokenizer fitted to a task's prompts and solutions.

    python tools/make_tiny_model.py --out model --config CONFIG.yaml

The work is done by sfpo_megatron/demo/tiny_model.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

# Run from a checkout as a script, so that the package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.paths import path_from_option
from sfpo_megatron.demo.tiny_model import (
    ARCHITECTURES,
    WRITTEN,
    TinyModel,
    make_tiny_model,
)
from sfpo_megatron.outputs.owned import MARKER, NotOurs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path_from_option, required=True, help="directory to write")
    parser.add_argument(
        "--config",
        type=path_from_option,
        required=True,
        help="YAML file whose data.train is the task",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    default = TinyModel()
    for field in fields(TinyModel):
        name, value = f"--{field.name.replace('_', '-')}", getattr(default, field.name)
        if isinstance(value, bool):
            parser.add_argument(name, action="store_true", default=value, help="the default")
            parser.add_argument(f"--un{field.name}", dest=field.name, action="store_false")
        else:
            choices = tuple(ARCHITECTURES) if field.name == "arch" else None
            says = f"default: {value}"
            parser.add_argument(name, type=type(value), choices=choices, default=value, help=says)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make it; 2 where others' files are in the way, or what was given is wrong."""
    args = parse_args(argv)
    sizes = TinyModel(**{field.name: getattr(args, field.name) for field in fields(TinyModel)})
    try:
        config = load_config(args.config)
        make_tiny_model(config, args.out, sizes, seed=args.seed, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        hint = _hint(args.out) if isinstance(error, NotOurs) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    return 0


def _hint(out: Path) -> str:
    """How to make room, where an earlier version of this tool, which left no marker, may have
    written with another seed or other sizes."""
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if "config.json" not in names or MARKER in names or not names <= set(WRITTEN):
        return ""
    free = (f"{out}.old{number or ''}" for number in itertools.count())
    old = next(path for path in free if not os.path.lexists(path))
    return f" (of an earlier version of this tool? mv {shlex.quote(str(out))} {shlex.quote(old)})"


if __name__ == "__main__":
    raise SystemExit(main())
