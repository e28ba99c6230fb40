"""A metrics sink of your own: `tracking: {sinks: [console, jsonl, "sink:Csv"]}`."""

from __future__ import annotations

from sfpo_megatron.tracking.sinks import Metrics, RunInfo


class Csv:
    """Writes RUN/reward.csv."""

    def __init__(self, run: RunInfo) -> None:
        self._file = (run.directory.path / "reward.csv").open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        if "reward_mean" in metrics:
            print(f"{metrics['step']},{metrics['reward_mean']}", file=self._file, flush=True)

    def text(self, line: str) -> None:
        """Nothing is made of progress lines."""

    def close(self) -> None:
        self._file.close()
