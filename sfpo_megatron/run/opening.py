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
from sfpo_megatron.data.prompts import PromptStream
from sfpo_megatron.data.run_data import RunData
from sfpo_megatron.host.gpus import VISIBLE, visible_devices
from sfpo_megatron.host.spans import span
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.offload import Offload
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.stopping import NoStop
from sfpo_megatron.outputs.trace import NoTrace, Trace
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.placement import RankDevice
from sfpo_megatron.run.continuing import Start, find
from sfpo_megatron.run.ends import Fleet, MainEnds, NoFleet, NoRefit, WeightSender, stop_watch
from sfpo_megatron.run.engineless import NoFeed
from sfpo_megatron.run.engines import Engines, is_colocated
from sfpo_megatron.run.feed import EngineFeed, Feed
from sfpo_megatron.run.held_out import Best, EngineEvaluation, Evaluation, NoEvaluation
from sfpo_megatron.run.length import said_length, train_length
from sfpo_megatron.run.same_data import held_to, read_data
from sfpo_megatron.run.same_gate import closed_by_others
from sfpo_megatron.run.same_model import hold_to_model, hold_weights_to_model
from sfpo_megatron.run.saved_rollouts import NoSaver, RolloutSaver, SavedFeed
from sfpo_megatron.run.saving import read_run_state
from sfpo_megatron.run.sinks import begin_tracing, open_sinks
from sfpo_megatron.run.together import end_together
from sfpo_megatron.tracking.details import Details
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
            self.important("warning: colocated engines are unverified on this hardware")
        return Engines(config, self.ends, policy.control, refit, Offload(policy, scratch))

    def wait_ready(self, when: str) -> None:
        """Wait for the engines, on rank 0."""
        client = self.ends.fleet.sync_client
        if client is None:
            return
        begun = time.monotonic()
        with span("engines"), self.ends.polling():
            self.ends.fleet.wait_ready(self.config.rollout.timeout_s)
        waited = time.monotonic() - begun
        self.progress(f"engines ready (waited {waited:.1f} s {when}), refit by {client.transport}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics, at the end of a train step."""
        self.ends.tracker.log(metrics)
        self.ends.trace.logged(metrics["step"])

    def show(self, details: Details) -> None:
        """What a line of metrics cannot hold, after it."""
        self.ends.tracker.details(details)

    def progress(self, text: str) -> None:
        """A line for the person who watches."""
        self.ends.tracker.progress(text)

    def important(self, text: str) -> None:
        """A line that must not be missed: a warning, or how the run has ended."""
        self.ends.tracker.important(text)


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
    # Prompts first: a wrong row ends the run before anything is written or any engine starts.
    with span("data"):
        needs_data = is_main and not config.debug.train_only
        data = read_data(config, start.continued) if needs_data else None
    num_prompts = data.prompts.epoch_size if data is not None else 0
    trace = begin_tracing(config, start, control)
    given, config = config, train_length(config, control, num_prompts)
    with ExitStack() as closing:
        closing.callback(trace.close)
        ends = other_ends()
        if is_main:
            num_steps, num_epochs = config.train.steps, given.train.num_epochs
            said = [f"run {RunDirectory.of(config.output_dir).path}: {num_steps} train steps"]
            warnings: Iterable[str] = ()
            if num_epochs is not None:
                said.append(said_length(num_epochs, num_prompts, num_steps, "prompts"))
            if (continued := start.continued) is not None:  # refused before anything is replaced
                state = read_run_state(continued.directory)
                hold_to_model(config, continued, state)
                warnings = closed_by_others(config, state)
                if data is not None:
                    data, changed = held_to(data, config, continued, accept_data_change)
                    said += changed
            elif start.found is not None:
                hold_weights_to_model(config, start.found)
            tracker = open_sinks(given, config, start, closing, num_steps=num_steps, said=said)
            for warning in warnings:
                tracker.important(warning)
            ends = _main_ends(config, start, devices, closing, tracker, data, trace)
        opened = OpenedRun(
            config=config,
            directory=RunDirectory.of(config.output_dir),
            is_main=is_main,
            start=start,
            store=store,
            ends=ends,
            closing=closing,
        )
        if is_colocated(config):
            if is_main:
                opened.wait_ready("before Megatron")
                opened.ends.fleet.sleep()
            control.barrier()
        yield opened
        end_together(control)


def other_ends() -> MainEnds:
    """The ends of a rank that does not talk to engines."""
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
    tracker: Tracker,
    data: RunData | None,
    trace: Trace | NoTrace,
) -> MainEnds:
    """Start the engines; without `data` there are none."""
    fleet: Fleet
    feed: Feed
    evaluation: Evaluation
    if data is None:
        assert config.debug.train_only, "a run without prompts trains on saved rollouts"
        fleet, feed, evaluation = NoFleet(), SavedFeed(config.debug.train_only), NoEvaluation()
    else:
        prompts, held_out = data.prompts, tuple(data.held_out)
        prompts.hold_batch(config.drawn_per_step)
        tracker.progress(data.summary)
        fleet, feed, evaluation = _start_engines(config, prompts, held_out, devices, closing)
    saved = config.debug.save_rollouts
    return MainEnds(
        stop=stop_watch(config),
        tracker=tracker,
        fleet=fleet,
        feed=feed,
        saver=RolloutSaver(saved, up_to_step=start.continued_step) if saved else NoSaver(),
        evaluation=evaluation,
        best=Best(evaluation.asked),
        trace=trace,
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


def _trainer_devices() -> list[RankDevice]:
    """The device of every rank, by rank; empty without CUDA. Collective there."""
    if not torch.cuda.is_available():
        return []
    # As processes know it that see all of the machine's.
    names = visible_devices() if VISIBLE in os.environ else range(torch.cuda.device_count())
    device = str(names[torch.cuda.current_device()])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), device))
    return [RankDevice(address=address, device=device) for address, device in found]
