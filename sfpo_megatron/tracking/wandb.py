"""The sink `wandb`: Weights & Biases, online or into RUN/wandb.

The library's own variables hold: WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, WANDB_BASE_URL... Its id
of the run is ours, which every checkpoint has: a run that is resumed continues the same curves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import wandb

from sfpo_megatron.tracking.details import COLUMNS, Details
from sfpo_megatron.tracking.settings import settings
from sfpo_megatron.tracking.sinks import Metrics, RunInfo, is_failing

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


class WandbSink:
    """One row of history a step: its train line and its evaluation together."""

    def __init__(self, run: RunInfo) -> None:
        self._run = _open(run)
        self._files = Path(self._run.dir)  # uploaded with the run
        if run.directory.config.exists():  # wandb has a config.yaml of its own
            text = run.directory.config.read_text(encoding="utf-8")
            (self._files / "run-config.yaml").write_text(text, encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        found = {name: value for name, value in metrics.items() if value is not None}
        self._run.log(found, step=found["step"])

    def text(self, line: str) -> None:
        with (self._files / "progress.txt").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def details(self, details: Details) -> None:
        found: dict[str, wandb.Histogram | wandb.Table] = {
            f"distribution/{name}": wandb.Histogram(list(values))
            for name, values in details.distributions.items()
        }
        if details.samples:
            rows = [[*cells, json.dumps(parts)] for *cells, parts in details.rows()]
            found["samples"] = wandb.Table(columns=list(COLUMNS), data=rows)
        self._run.log(found, step=details.step)

    def close(self) -> None:
        self._run.finish(exit_code=1 if is_failing() else 0)


def _open(run: RunInfo) -> Run:
    """The run there; offline if it cannot be online, so that nothing is lost."""
    try:
        with _no_questions():
            return _init(run)
    except wandb.Error as error:  # no key, no network, no permission
        if os.environ.get("WANDB_MODE") is not None:
            raise
        why = " ".join(str(error).split())
        print(
            f"warning: tracking.sinks: wandb is not online ({why}): written to "
            f"{run.directory.path / 'wandb'}, which `wandb sync` uploads",
            file=sys.stderr,
            flush=True,
        )
        wandb.teardown()  # its service still has the run that did not come up
        return _init(run, mode="offline")


def _init(run: RunInfo, *, mode: str | None = None) -> Run:
    run.directory.path.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=run.config.tracking.project,
        name=run.name,
        id=run.run_id or None,
        resume="allow",
        mode=mode,
        dir=str(run.directory.path),
        config=settings(run.config),
        allow_val_change=True,  # a resumed run may have other settings
        # It would replace stdout and stderr, which engines and scoring processes inherit.
        settings=wandb.Settings(console="off"),
    )


@contextmanager
def _no_questions() -> Iterator[None]:
    """Without a key wandb asks for one at a terminal, and the other ranks would wait."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
