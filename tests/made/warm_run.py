"""A process that makes one run after another, each in a second: without the half minute of a start.

    python warm_run.py < lines, each a folder with a run.yaml and its files

Answers a line of JSON to each: {"refused": the line of `check`}; {"done": [what it did]}; or
{"failed": what, "error": a traceback}. Engines are in none of it: a run with engines reads its
prompts, asks for rollouts, and trains on made-up ones.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.config.tree import DebugConfig, RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.host import spans

LOG = "warm.log"
MOST_ROLLOUTS = 64
"""Rollouts of a train step above which none are made up."""
MOST_PASSES = 20
"""Fast passes above which no step is made."""
MOST_ROWS = 1000
"""Rows above which no source is read."""


def be_one_rank() -> None:
    """Set what torchrun sets for the only rank of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


class Asked(Exception):
    """A request was asked for, and nobody is there to answer."""


class NobodyThere:
    """In the place of `RolloutClient`: takes requests."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def submit(self, request: Any) -> None:
        """Check it as the controller does."""
        from sfpo_megatron.rollout.sampling import check_lengths

        check_lengths(request, self._config)

    def collect(self, request_id: str, refit: object) -> Any:
        """End here."""
        raise Asked

    collect_scored = collect


def ask(config: RunConfig) -> None:
    """Do all that a run does before its engines answer."""
    from sfpo_megatron.data.tokenize import load_tokenizer
    from sfpo_megatron.rollout.episode_runner import EpisodeRunner
    from sfpo_megatron.rollout.episodes import check_environment
    from sfpo_megatron.run.feed import EngineFeed
    from sfpo_megatron.run.held_out import EngineEvaluation
    from sfpo_megatron.run.same_data import read_data

    data, client = read_data(config, None), NobodyThere(config)
    data.prompts.hold_batch(config.drawn_per_step)
    check_environment(config)
    EpisodeRunner(config, load_tokenizer(config.model.path), client).close()
    with suppress(Asked):
        EngineFeed(config, client, data.prompts).collect(1, lambda: None)
    if data.held_out:
        with suppress(Asked):
            EngineEvaluation(config, client, tuple(data.held_out))(1, lambda: None)


def with_rollouts(config: RunConfig) -> RunConfig | None:
    """The config with saved rollouts in the place of engines; None if that trains nothing."""
    import digits

    given, debug = config.train, config.debug
    if config.sfpo.num_fast_passes > MOST_PASSES:
        return None
    if debug.train_only is not None:
        return config
    if debug.rollout_only or given.prompts_per_step * given.group_size > MOST_ROLLOUTS:
        return None
    train = given
    if given.num_steps not in (1, 2):
        optimizer = replace(given.optimizer, lr_schedule="constant", lr_decay_steps=None)
        train = replace(given, optimizer=optimizer, num_epochs=None, num_steps=1)
    sizes = {"num_prompts": given.prompts_per_step, "group_size": given.group_size}
    digits.save_rollouts(Path("made.safetensors"), num_steps=train.steps, **sizes)
    debug = DebugConfig(train_only="made.safetensors", save_rollouts=debug.save_rollouts)
    return replace(config, train=train, debug=debug, eval=replace(config.eval, stop_at=None))


def run(command: str, config: RunConfig) -> None:
    """Be the rank of a whole run."""
    from sfpo_megatron.mcore.setup import init_distributed, shut_down

    capabilities = init_distributed(config)
    try:
        if command == "sft":
            from sfpo_megatron.sft import run
        else:
            from sfpo_megatron.trainer import run
        run(config, capabilities)
    finally:
        spans._watchers.clear()  # of the run's trace, which ends with its process elsewhere
        shut_down()


def parts(config: RunConfig) -> Iterator[tuple[str, partial[None]]]:
    """What the run does, by name, in calls."""
    sources = (*config.data.train, *config.data.eval)
    reads = all((source.size or 0) < MOST_ROWS for source in sources)
    if config.debug.train_only is None and reads:
        yield "ask", partial(ask, config)
    fitting = with_rollouts(config)
    if fitting is not None:
        yield "train", partial(run, "train", fitting)
    if reads and (config.sft.num_steps != 1 or config.sft.eval_every):
        yield "sft", partial(run, "sft", replace(config, output_dir=f"{config.output_dir}/sft"))


def answer(folder: str) -> dict[str, Any]:
    """Make the run of FOLDER/run.yaml."""
    os.chdir(folder)
    os.environ["HOME"] = f"{folder}/../home"
    check = partial(check_config, file="run.yaml", world_size=1, for_training=True)
    done: list[str] = []
    try:
        config = load_config("run.yaml")
        check(config)
        for name, do in parts(config):
            if name == "sft":
                check(config, fills_batches=False)
            do()
            done.append(name)
    except (ConfigError, DataError) as error:  # the latter is `check --data`'s
        return {"refused": str(error), "done": done}
    except BaseException:
        return {"failed": name, "error": traceback.format_exc()}
    return {"done": done}


def main() -> None:
    """Answer stdin; what runs print goes to LOG."""
    be_one_rank()
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
