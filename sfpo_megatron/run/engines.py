"""Everything a run has besides the model: engines, prompts, metrics, files; held by rank 0.

On the other ranks every method is empty but for its collectives, so that the loop reads the same
on all of them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sfpo_megatron.checkpoints.store import CheckpointStore, Found
from sfpo_megatron.checkpoints.store import at as checkpoint_at
from sfpo_megatron.config.load import dump_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.evaluate import evaluate
from sfpo_megatron.host.stopping import OutOfTime, StopWatch, lost_peer
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.outputs.metrics import cut_metrics
from sfpo_megatron.outputs.plot import plot
from sfpo_megatron.outputs.table import summary_table
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.rollout.placement import RankDevice
from sfpo_megatron.run.feed import EngineFeed, RolloutSaver, SavedFeed, share
from sfpo_megatron.run.turns import Turns
from sfpo_megatron.tracking.sinks import Tracker
from sfpo_megatron.types import Prompt, RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.offload import Offload
    from sfpo_megatron.resharding.source import MegatronWeightSource
    from sfpo_megatron.rollout.client import RolloutClient

HELD_ROLLOUTS = "rollouts.safetensors"
T = TypeVar("T")


@contextmanager
def open_run(config: RunConfig) -> Iterator[RunIO]:
    """Start the engines (rank 0) and return at once, or when they are ready and asleep if they are
    colocated; close everything at the end, come what may."""
    io = RunIO(config)
    try:
        io.start()
        yield io
    finally:
        io.close()


class RunIO:
    """See `open_run`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._is_main = dist.get_rank() == 0
        self._client: RolloutClient | None = None
        self._feed: EngineFeed | SavedFeed | None = None
        self._refit: Refit | None = None
        self._tracker: Tracker | None = None
        self._eval_prompts: list[Prompt] = []
        self._saver: RolloutSaver | None = None
        self.store: CheckpointStore | None = None
        """On rank 0, where the run keeps its checkpoints."""
        self.stop: StopWatch | None = None
        """On rank 0, where requests to stop are seen."""
        self.found: Found | None = None
        """On rank 0, the checkpoint that this run continues from."""
        self.best: tuple[int, float] | None = None
        """(train step, eval/accuracy) of the best evaluation."""
        self._control: ControlGroup | None = None
        self._weight_version = 0
        self._colocated = (
            config.rollout.placement == "colocated" and config.debug.train_only is None
        )
        self._turns: Turns | None = None

    def start(self) -> None:
        """Rank 0: write config.yaml, open metrics.jsonl, start the engines, read the prompts.
        Colocated engines are asleep when this returns. Collective."""
        trainer = _trainer_devices()
        waiting = ControlGroup(self._config.train.control_timeout_s) if self._colocated else None
        if self._is_main:
            self._start(trainer)
        if waiting is not None:
            if self._client is not None:
                self._wait_ready("before Megatron")
                self._client.sleep()
            waiting.barrier()

    def _start(self, trainer: list[RankDevice]) -> None:
        config = self._config
        self._open_checkpoints()
        step = self.found.step if self.found is not None and self.found.has_run_state else 0
        out = prepare_output(config, "metrics.jsonl", up_to_step=step)
        self._tracker = Tracker(config)
        self._tracker.progress(f"run {out}: {config.train.num_steps} train steps")
        if config.debug.save_rollouts:
            self._saver = RolloutSaver(config.debug.save_rollouts, up_to_step=step)
        if config.debug.train_only:
            self._feed = SavedFeed(config.debug.train_only)
            return
        from transformers import AutoTokenizer

        from sfpo_megatron.rollout.controller import start_rollouts

        # Prompts first: a wrong row ends the run before any engine starts.
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        prompts = PromptStream(config, tokenizer)
        self._eval_prompts = eval_prompts(config, tokenizer)
        self._tracker.progress(f"{prompts.summary}, {len(self._eval_prompts)} held out")
        self._client = start_rollouts(config, model_path=config.model.path, trainer=trainer)
        self._feed = EngineFeed(config, self._client, prompts)

    def _open_checkpoints(self) -> None:
        """Find out what to continue from, before anything is written and any engine starts."""
        config, section = self._config, self._config.checkpoint
        if config.debug.rollout_only:
            return
        if config.saves_state:
            self.stop = StopWatch(
                config.output_dir,
                must_save_within_s=section.must_save_within_s,
                stop_before_walltime_s=section.stop_before_walltime_s,
            )
        self.store = store = CheckpointStore(
            Path(config.output_dir).expanduser() / "checkpoints",
            form=section.format,
            keep_last=section.keep_last,
            keep_best=section.keep_best,
        )
        if section.resume == "auto":
            self.found = store.newest_good(warn)
        elif section.resume != "never":
            self.found = checkpoint_at(Path(section.resume).expanduser())
        if self.found is None or not self.found.has_run_state:
            store.retire()
        else:
            store.abandon_after(self.found.step)

    @contextmanager
    def _polling(self) -> Iterator[None]:
        """`_poll` while rank 0 waits for engines in here: only where no collective is under way."""
        if self._client is None:
            yield
            return
        self._client.on_poll = self._poll
        try:
            yield
        finally:
            self._client.on_poll = None

    def _poll(self) -> None:
        """While rank 0 waits for engines: is a rank gone, is the run to stop?"""
        if self.stop is not None and self.stop.reason is not None:
            if (pid := lost_peer()) is not None:
                raise RuntimeError(f"another rank (pid {pid}) is gone; its own message says why")
            self.stop.check()

    def connect(self, control: ControlGroup, source: MegatronWeightSource) -> None:
        """Wait for the engines and tie the refit to them. Collective."""
        if self._client is not None and not self._colocated:
            self._wait_ready("after Megatron")
        control.barrier()
        self._control = control
        if self._config.debug.train_only is None:
            self._refit = Refit(
                self._config,
                source=source,
                client=self._client.sync_client if self._client else None,
                is_sender=self._is_main,
            )

    def _wait_ready(self, when: str) -> None:
        assert self._client is not None
        begun = time.monotonic()
        with self._polling():
            self._client.wait_ready(self._config.rollout.timeout_s)
        waited, way = time.monotonic() - begun, self._client.sync_client.transport
        self.progress(f"engines ready (waited {waited:.1f} s {when}), refit by {way}")

    def share_devices(self, offload: Offload) -> None:
        """From now on colocated engines get the devices whenever they are asked for something."""
        if self._colocated:
            assert self._control is not None
            if torch.cuda.is_available():
                self.progress("warning: colocated engines are unverified on this hardware")
            self._turns = Turns(offload, self._control, self._tell_engines)

    def to_trainer(self) -> None:
        """The devices are the trainer's: before its weights are used. Collective."""
        if self._turns is not None:
            self._turns.to_trainer()

    def end_engines(self) -> None:
        """The trainer has one more thing to do, and nothing will be generated. Collective."""
        if self._turns is not None:
            self._turns.end_engines(self._client.close if self._client else lambda: None)

    def _to_engines(self) -> None:
        if self._turns is not None and not self._turns.is_engines:
            self.refit(weight_version=self._weight_version)

    def _tell_engines(self, method: str, *arguments: Any) -> None:
        self._on_main(lambda feed, resend: getattr(self._client, method)(*arguments))

    def collect(self, step: int) -> RolloutBatch | None:
        """The step's rollouts, on every rank; None if the run is to stop and there is no time for
        them, with the data cursor where it was. Collective."""
        assert self._control is not None
        self._to_engines()
        batch = self._on_main(lambda feed, resend: self._collect_in_time(feed, step, resend))
        if self._saver is not None and batch is not None:
            self._saver.add(step, batch)
        return share(self._control, batch)

    def refit(self, *, weight_version: int) -> None:
        """Weights into the engines; the devices are theirs then. Collective."""
        if self._refit is not None:
            self._weight_version = weight_version
            with self._turns.to_engines() if self._turns is not None else nullcontext():
                self._refit.send(weight_version)

    def wait_generated(self) -> None:
        """With async_steps, until the next step's rollouts need no engine any more. Collective."""
        if self._config.rollout.async_steps:
            self._on_main(lambda feed, resend: feed.wait_generated())

    def evaluate(self, *, step: int) -> None:
        """Held-out accuracy into the metrics. Collective."""
        if self._config.debug.train_only or not self._config.data.eval:
            return
        self._to_engines()

        def run(feed: EngineFeed | SavedFeed, resend: Callable[[], None]) -> None:
            assert self._client is not None
            metrics = evaluate(
                self._config, self._client, self._eval_prompts, step=step, refit=resend
            )
            self.log(metrics)
            if self.best is None or metrics["eval/accuracy"] > self.best[1]:
                self.best = step, metrics["eval/accuracy"]

        self._on_main(run)

    def hold(self) -> None:
        """Take in the rollouts that were begun ahead, for a checkpoint. Collective."""
        if self._config.rollout.async_steps:
            self._on_main(lambda feed, resend: feed.hold(resend))

    def save_state(self, directory: Path) -> dict[str, Any]:
        """What a checkpoint keeps of this, on rank 0: data cursor and best evaluation, returned;
        rollouts of the next step, written."""
        assert self._feed is not None, "rank 0 alone has it"
        if tensors := self._feed.held_tensors():
            save_file(tensors, directory / HELD_ROLLOUTS)
        return {"data": self._feed.state_dict(), "best": self.best}

    def load_state(self, state: Mapping[str, Any], directory: Path) -> None:
        """Inverse of `save_state`."""
        if self._feed is None:
            return
        held = directory / HELD_ROLLOUTS
        self._feed.load_state_dict(state["data"], load_file(held) if held.exists() else {})
        self.best = tuple(state["best"]) if state["best"] is not None else None

    def _collect_in_time(
        self, feed: EngineFeed | SavedFeed, step: int, resend: Callable[[], None]
    ) -> RolloutBatch | None:
        try:
            with self._polling():
                return feed.collect(step, resend)
        except OutOfTime:
            return None

    def _on_main(self, work: Callable[[EngineFeed | SavedFeed, Callable[[], None]], T]) -> T | None:
        """What rank 0 does with the engines, while the other ranks wait to help: engines that were
        started anew want the weights again, whose gathering takes all ranks. Collective; None
        but on rank 0. `FleetLost` is raised on every rank, outside of any collective."""
        assert self._control is not None
        control = self._control

        def resend() -> None:
            control.broadcast_json({"do": "refit"})
            self._resend()

        if self._feed is not None:
            try:
                result = work(self._feed, resend)
            except FleetLost as error:
                control.broadcast_json({"do": "stop", "reason": str(error)})
                raise
            control.broadcast_json({"do": "go on"})
            return result
        while (order := control.broadcast_json())["do"] == "refit":
            with suppress(FleetLost):  # rank 0 has it too, and says so once more
                self._resend()
        if order["do"] == "stop":
            raise FleetLost(order["reason"])
        return None

    def _resend(self) -> None:
        assert self._refit is not None
        if self._turns is None:
            self._refit.send(self._weight_version, resend=True)
            return
        self._turns.to_trainer()  # no engine can generate: they all lie idle
        with self._turns.to_engines():
            self._refit.send(self._weight_version, resend=True)

    @property
    def rollout_metrics(self) -> dict[str, float]:
        """Of the last batch (rank 0): seconds, age, what was dropped and restarted."""
        moves = self._turns.times if self._turns is not None else {}
        return {**(self._feed.metrics if self._feed is not None else {}), **moves}

    def progress(self, text: str) -> None:
        """A line for the person who watches."""
        if self._tracker is not None:
            self._tracker.progress(text)

    def log(self, metrics: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.log(metrics)

    def finish(self, source: MegatronWeightSource) -> None:
        """Export the policy, then the table and the plot. Collective."""
        out, config = Path(self._config.output_dir), self._config
        self.to_trainer()
        if not config.debug.rollout_only:
            export_hf(
                source,
                out / "hf",
                model_path=config.model.path,
                dtype=config.model.dtype,
                is_writer=self._is_main,
            )
        if self._tracker is not None and "jsonl" in config.tracking.sinks:
            plot(out / "metrics.jsonl", out / "plot.png")
            resumed = self.found.step if self.found and self.found.has_run_state else None
            table = summary_table(out / "metrics.jsonl", resumed_after=resumed)
            self._tracker.progress(table)
            self._tracker.progress(f"policy: {out / 'hf'}   curve: {out / 'plot.png'}")

    def close(self) -> None:
        """End the engines and close the files."""
        if self._refit is not None:
            self._refit.close()
        if self._client is not None:
            self._client.close()
        if self._tracker is not None:
            self._tracker.close()


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _trainer_devices() -> list[RankDevice]:
    """Where every rank computes, by rank; empty without CUDA. Collective there."""
    if not torch.cuda.is_available():
        return []
    device = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if device < len(visible) and visible[device].isdigit():  # as processes know it that see all
        device = int(visible[device])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), device))
    return [RankDevice(address=address, device=device) for address, device in found]


def prepare_output(config: RunConfig, metrics_name: str, *, up_to_step: int = 0) -> Path:
    """Make output_dir, write config.yaml. An earlier run's metrics are kept under another name; of
    a run that continues after step `up_to_step`, the lines up to it stay where they are."""
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / metrics_name
    if up_to_step:
        cut_metrics(metrics, up_to_step)
    elif metrics.exists() and metrics.stat().st_size:
        number = len(list(out.glob(f"{metrics.stem}.previous-*"))) + 1
        metrics.rename(out / f"{metrics.stem}.previous-{number}{metrics.suffix}")
    aside = out / "config.yaml.tmp"
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.rename(out / "config.yaml")
    return out
