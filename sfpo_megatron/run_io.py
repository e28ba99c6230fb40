"""Everything a run has besides the model: engines, prompts, metrics, files; held by rank 0.

On the other ranks every method is empty but for its collectives, so that the loop reads the same
on all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sfpo_megatron.checkpoints.store import CheckpointStore, Found
from sfpo_megatron.checkpoints.store import at as checkpoint_at
from sfpo_megatron.config.load import dump_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.evaluate import evaluate
from sfpo_megatron.report.metrics import cut_metrics
from sfpo_megatron.report.plot import plot
from sfpo_megatron.report.table import summary_table
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout_feed import EngineFeed, RolloutSaver, SavedFeed
from sfpo_megatron.stopping import OutOfTime, StopWatch, lost_peer
from sfpo_megatron.tracking.sinks import Tracker
from sfpo_megatron.types import Prompt, RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup
    from sfpo_megatron.resharding.source import MegatronWeightSource
    from sfpo_megatron.rollout.client import RolloutClient


@contextmanager
def open_run(config: RunConfig) -> Iterator[RunIO]:
    """Start the engines (rank 0) and return at once; close everything at the end, come what may."""
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

    def start(self) -> None:
        """Rank 0: write config.yaml, open metrics.jsonl, start the engines, read the prompts."""
        if not self._is_main:
            return
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
        self._client = start_rollouts(config, model_path=config.model.path)
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

    def _poll(self) -> None:
        """While rank 0 waits for engines: is a rank gone, is the run to stop?"""
        if self.stop is not None and self.stop.reason is not None:
            if (pid := lost_peer()) is not None:
                raise RuntimeError(f"another rank (pid {pid}) is gone; its own message says why")
            self.stop.check()

    def connect(self, control: ControlGroup, source: MegatronWeightSource) -> None:
        """Wait for the engines and tie the refit to them. Collective."""
        if self._client is not None and self._tracker is not None:
            begun = time.monotonic()
            self._client.on_poll = self._poll
            self._client.wait_ready(self._config.rollout.timeout_s)
            self._client.on_poll = None
            waited = time.monotonic() - begun
            self._tracker.progress(f"engines ready (waited {waited:.1f} s after Megatron)")
        control.barrier()
        if self._config.debug.train_only is None:
            self._refit = Refit(
                self._config,
                source=source,
                client=self._client.sync_client if self._client else None,
                is_sender=self._is_main,
            )

    def collect(self, step: int) -> RolloutBatch | None:
        """The step's rollouts on rank 0, None elsewhere; on rank 0 None if the run is to stop and
        there is no time for them, with the data cursor where it was."""
        if self._feed is None:
            return None
        cursor = self._feed.state_dict()
        try:
            if self._client is not None:
                self._client.on_poll = self._poll
            batch = self._feed.collect(step)
        except OutOfTime:
            self._feed.load_state_dict(cursor)
            return None
        finally:
            if self._client is not None:
                self._client.on_poll = None
        if self._saver is not None:
            self._saver.add(step, batch)
        return batch

    def refit(self, *, weight_version: int) -> None:
        """Weights into the engines. Collective."""
        if self._refit is not None:
            self._refit.send(weight_version)

    @property
    def times(self) -> dict[str, float]:
        """Generation and scoring seconds of the last batch (rank 0)."""
        return self._feed.times if self._feed is not None else {}

    def evaluate(self, *, step: int) -> None:
        """Held-out accuracy into the metrics. Rank 0; the others go on and wait at the next
        collective."""
        if self._client is not None and self._eval_prompts:
            metrics = evaluate(self._config, self._client, self._eval_prompts, step=step)
            self.log(metrics)
            if self.best is None or metrics["eval/accuracy"] > self.best[1]:
                self.best = step, metrics["eval/accuracy"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this: data cursor and best evaluation."""
        assert self._feed is not None, "rank 0 alone has it"
        return {"data": self._feed.state_dict(), "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        if self._feed is None:
            return
        self._feed.load_state_dict(state["data"])
        self.best = tuple(state["best"]) if state["best"] is not None else None

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
