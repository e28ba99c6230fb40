"""`sfpo-megatron demo`: a small policy and its problems, a warm start, and SFPO.

The warm start and the training are the commands that a user gives, each printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.overrides import override_of
from sfpo_megatron.config.paths import escape, path_from_option
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.demo import CONFIG, RUN
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.owned import NotOurs

_NEEDED = ("torch", "megatron", "vllm", "ray", "transformers", "reasoning_gym", "pyarrow")
_NUM_SHOWN = 2


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    command.add_argument(
        "--seed", type=int, default=0, help="of weights, order and sampling (default: 0)"
    )
    command.add_argument(
        "--run",
        dest="run_dir",
        type=path_from_option,
        default=Path(RUN),
        metavar="DIR",
        help=f"directory of everything that is made (default: {RUN})",
    )
    command.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="set a key of the demo's config, such as sfpo.num_fast_passes=0, which is GRPO",
    )
    command.set_defaults(config=str(CONFIG), needs_config=False)


def run(arguments: argparse.Namespace) -> int:
    """Make, warm-start and train, in processes that all end with this one; the exit code."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(
            f"error: found no {', '.join(missing)} in {sys.executable}, expected what a run needs; "
            "install it with `sfpo-megatron install cpu`",
            file=sys.stderr,
        )
        return 1
    places = _Places(arguments.run_dir)
    common = [*arguments.overrides, f"seed={arguments.seed}", *places.overrides()]
    config = load_config(arguments.config, common)
    from sfpo_megatron.launcher.supervise import supervise

    return supervise(partial(_demo, places, config, common))


class _Places:
    """The paths of what is made, below RUN."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.data, self.model, self.warm_start = (
            run / name for name in ("data", "model", "warm_start")
        )

    def overrides(self) -> list[str]:
        """What the training has in place of the config's own paths."""
        return [
            _set("output_dir", self.run),
            _set("model.path", RunDirectory.of(self.warm_start).hf),
            _set("data.train.0.path", self.data / "legs-train.parquet"),
            _set("data.eval.0.path", self.data / "legs-eval.parquet"),
        ]


def _set(key: str, path: Path) -> str:
    """The override that sets a path."""
    return override_of(key, escape(str(path)))


def _demo(places: _Places, config: RunConfig, common: list[str]) -> int:
    """All of it; the exit code of the first command that fails."""
    signal.signal(signal.SIGINT, _interrupt)
    from sfpo_megatron.data.prepared import NotPrepared
    from sfpo_megatron.demo.legs import write_data
    from sfpo_megatron.demo.tiny_model import DEMO, make_tiny_model

    try:
        write_data(places.data)
        make_tiny_model(config, places.model, DEMO, seed=config.seed)
    except (NotOurs, NotPrepared) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    warm_start = [_set("output_dir", places.warm_start), _set("model.path", places.model)]
    for name, overrides, folder in (
        ("sft", [*common, *warm_start], places.warm_start),
        ("train", common, places.run),
    ):
        if code := _command(name, overrides):
            return code
        _show(RunDirectory.of(folder).hf, config)
    return 0


def _show(policy: Path, config: RunConfig) -> None:
    """Print rollouts, before and after training to the same problems."""
    from sfpo_megatron.demo.rollouts import as_text, sample

    sampled = sample(policy, config, num=_NUM_SHOWN)
    print(f"\n{_NUM_SHOWN} rollouts of {policy}:\n\n{as_text(sampled)}", flush=True)


def _command(name: str, overrides: list[str]) -> int:
    """Run one command of ours on the demo's config; its exit code."""
    words = [name, str(CONFIG), "--fresh", *overrides]
    print(f"\n$ sfpo-megatron {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "sfpo_megatron", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    return code if code >= 0 else 128 - code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Once: the end of a command that is under way is waited for."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
