"""Everything a run has besides the model: engines, prompts, metrics, files; held by rank 0.

On the other ranks every method is empty but for its collectives, so that the loop reads the same
on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sfpo_megatron.config.load import dump_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.evaluate import evaluate
from sfpo_megatron.report.plot import plot
from sfpo_megatron.report.table import summary_table
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout_feed import EngineFeed, RolloutSaver, SavedFeed
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

    def start(self) -> None:
        """Rank 0: write config.yaml, open metrics.jsonl, start the engines, read the prompts."""
        if not self._is_main:
            return
        config = self._config
        out = prepare_output(config, "metrics.jsonl")
        self._tracker = Tracker(config)
        self._tracker.progress(f"run {out}: {config.train.num_steps} train steps")
        if config.debug.save_rollouts:
            self._saver = RolloutSaver(config.debug.save_rollouts)
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

    def connect(self, control: ControlGroup, source: MegatronWeightSource) -> None:
        """Wait for the engines and tie the refit to them. Collective."""
        if self._client is not None and self._tracker is not None:
            begun = time.monotonic()
            self._client.wait_ready(self._config.rollout.timeout_s)
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
        """The step's rollouts on rank 0, None elsewhere."""
        if self._feed is None:
            return None
        batch = self._feed.collect(step)
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
            self.log(evaluate(self._config, self._client, self._eval_prompts, step=step))

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
            self._tracker.progress(summary_table(out / "metrics.jsonl"))
            self._tracker.progress(f"policy: {out / 'hf'}   curve: {out / 'plot.png'}")

    def close(self) -> None:
        """End the engines and close the files."""
        if self._refit is not None:
            self._refit.close()
        if self._client is not None:
            self._client.close()
        if self._tracker is not None:
            self._tracker.close()


def prepare_output(config: RunConfig, metrics_name: str) -> Path:
    """Make output_dir, write config.yaml; an earlier run's metrics are kept under another name."""
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / metrics_name
    if metrics.exists() and metrics.stat().st_size:
        number = len(list(out.glob(f"{metrics.stem}.previous-*"))) + 1
        metrics.rename(out / f"{metrics.stem}.previous-{number}{metrics.suffix}")
    aside = out / "config.yaml.tmp"
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.rename(out / "config.yaml")
    return out
