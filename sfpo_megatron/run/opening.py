"""Opens a run: its directory, prompts and engines on rank 0, before Megatron takes any memory.

Two constructions make everything there is: `open_run` before Megatron, `OpenedRun.engines` once the
policy is built. Other ranks than 0 get null objects, so that the loop reads the same on all.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.checkpoints.store import CheckpointStore, store_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import EVAL, PromptStream, eval_prompts, renamed, source_names
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.host.stopping import NoStop, Stopping, StopWatch
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.offload import Offload
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.placement import RankDevice
from sfpo_megatron.run.continuing import Start, find, hold_to_data, prepare_output
from sfpo_megatron.run.engines import (
    Engines,
    Fleet,
    MainEnds,
    NoFleet,
    NoRefit,
    WeightSender,
    is_colocated,
)
from sfpo_megatron.run.evaluation import EngineEvaluation, Evaluation, NoEvaluation
from sfpo_megatron.run.feed import EngineFeed, Feed, NoFeed
from sfpo_megatron.run.same_model import hold_to_model
from sfpo_megatron.run.saved_rollouts import NoSaver, RolloutSaver, SavedFeed
from sfpo_megatron.run.saving import read_run_state
from sfpo_megatron.tracking.tracker import NoTracker, Tracker
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.resharding.source import MegatronWeightSource


@dataclass(kw_only=True, frozen=True, slots=True)
class OpenedRun:
    """What a run has besides the model."""

    config: RunConfig
    directory: RunDirectory
    is_main: bool
    start: Start
    """Which run this is and what it continues from, on every rank."""
    store: CheckpointStore
    ends: MainEnds
    closing: ExitStack
    """Ends what the run has started, the newest first."""

    def engines(
        self,
        policy: Policy,
        source: MegatronWeightSource,
        scratch: Callable[[], Iterable[Tensor]],
    ) -> Engines:
        """The engines, ready and tied to the policy; `scratch` as in `Offload`. Collective."""
        config = self.config
        if not is_colocated(config):
            self.wait_ready("after Megatron")
        policy.control.barrier()
        refit: WeightSender = NoRefit()
        if config.debug.train_only is None:
            client = self.ends.fleet.sync_client
            refit = Refit(config, source=source, client=client)
        self.closing.callback(refit.close)
        if is_colocated(config) and torch.cuda.is_available():
            self.progress("warning: colocated engines are unverified on this hardware")
        return Engines(config, self.ends, policy.control, refit, Offload(policy, scratch))

    def wait_ready(self, when: str) -> None:
        """Wait for the engines, on rank 0."""
        client = self.ends.fleet.sync_client
        if client is None:
            return
        begun = time.monotonic()
        with self.ends.polling():
            self.ends.fleet.wait_ready(self.config.rollout.timeout_s)
        waited = time.monotonic() - begun
        self.progress(f"engines ready (waited {waited:.1f} s {when}), refit by {client.transport}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics."""
        self.ends.tracker.log(metrics)

    def progress(self, text: str) -> None:
        """A line for the person who watches."""
        self.ends.tracker.progress(text)


@contextmanager
def open_run(
    config: RunConfig, *, fresh: bool = False, accept_data_change: bool = False
) -> Iterator[OpenedRun]:
    """Start the engines (rank 0) and give the run at once, or once they are ready and asleep if
    they are colocated; close everything at the end, whatever happens. `fresh`: the run that is in
    output_dir is set aside first. `accept_data_change`: it may continue on other data.
    Collective."""
    devices = _trainer_devices()
    control = ControlGroup(config.train.control_timeout_s)
    is_main = control.rank == 0
    store = store_of(config)
    start = find(config, store, control, fresh=fresh)
    with ExitStack() as closing:
        opened = OpenedRun(
            config=config,
            directory=RunDirectory.of(config.output_dir),
            is_main=is_main,
            start=start,
            store=store,
            ends=_main_ends(config, start, devices, closing, accept_data_change)
            if is_main
            else _other_ends(),
            closing=closing,
        )
        if is_colocated(config):
            if is_main:
                opened.wait_ready("before Megatron")
                opened.ends.fleet.sleep()
            control.barrier()
        yield opened


def _other_ends() -> MainEnds:
    return MainEnds(
        stop=NoStop(),
        tracker=NoTracker(),
        fleet=NoFleet(),
        feed=NoFeed(),
        saver=NoSaver(),
        evaluation=NoEvaluation(),
    )


def _main_ends(
    config: RunConfig,
    start: Start,
    devices: list[RankDevice],
    closing: ExitStack,
    accept_data_change: bool,
) -> MainEnds:
    """Write config.yaml, open the sinks, read the prompts and start the engines."""
    continued = start.found if start.found is not None and start.found.has_run_state else None
    step = continued.step if continued is not None else 0
    directory = prepare_output(config, up_to_step=step)
    tracker = closing.enter_context(Tracker(config))
    tracker.progress(f"run {directory.path}: {config.train.num_steps} train steps")
    tracker.progress(start.said)
    fleet: Fleet
    feed: Feed
    evaluation: Evaluation
    state = {} if continued is None else read_run_state(continued.directory)
    if continued is not None:
        hold_to_model(config, continued, state)
    if config.debug.train_only:
        fleet, feed, evaluation = NoFleet(), SavedFeed(config.debug.train_only), NoEvaluation()
    else:
        # Prompts first: a wrong row ends the run before any engine starts.
        tokenizer = load_tokenizer(config.model.path)
        prompts = PromptStream(config, tokenizer)
        held_out = tuple(eval_prompts(config, tokenizer))
        tracker.progress(f"{prompts.summary}, {len(held_out)} held out")
        if continued is not None:
            said = hold_to_data(prompts, continued, state, directory, accept=accept_data_change)
            if said:
                tracker.progress(said)
            held_out = renamed(held_out, source_names(config.data.eval, EVAL), prompts.eval_names)
        fleet, feed, evaluation = _start_engines(config, prompts, held_out, devices, closing)
    saved = config.debug.save_rollouts
    return MainEnds(
        stop=_stop_watch(config),
        tracker=tracker,
        fleet=fleet,
        feed=feed,
        saver=RolloutSaver(saved, up_to_step=step) if saved else NoSaver(),
        evaluation=evaluation,
    )


def _start_engines(
    config: RunConfig,
    prompts: PromptStream,
    held_out: Sequence[Prompt],
    devices: list[RankDevice],
    closing: ExitStack,
) -> tuple[Fleet, Feed, Evaluation]:
    from sfpo_megatron.rollout.controller import start_rollouts

    client = start_rollouts(config, model_path=config.model.path, trainer=devices)
    closing.callback(client.close)
    evaluation = EngineEvaluation(config, client, held_out)
    return client, EngineFeed(config, client, prompts), evaluation


def _stop_watch(config: RunConfig) -> Stopping:
    if not config.saves_state:
        return NoStop()
    return StopWatch(
        RunDirectory.of(config.output_dir),
        must_save_within_s=config.checkpoint.must_save_within_s,
        stop_before_walltime_s=config.checkpoint.stop_before_walltime_s,
    )


def _trainer_devices() -> list[RankDevice]:
    """The device of every rank, by rank; empty without CUDA. Collective there."""
    if not torch.cuda.is_available():
        return []
    device = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if device < len(visible) and visible[device].isdigit():  # as processes know it that see all
        device = int(visible[device])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), device))
    return [RankDevice(address=address, device=device) for address, device in found]
