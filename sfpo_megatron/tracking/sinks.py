"""What a metrics sink is: somewhere that a run's metrics and progress lines go.

`SINK` in plugins.py lists what is built in; `tracking.sinks` takes a class of your own too
(docs/extend.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.tracking.details import Details

Number = float | int | bool | None
Metrics = Mapping[str, Number]
"""One line: `step` and what was measured there; None stands for NaN and infinities."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RunInfo:
    """What a sink is told about the run when it is made."""

    config: RunConfig
    directory: RunDirectory
    num_steps: int
    """Steps that the run is going to make; of `sft`, its own."""
    run_id: str = ""
    """The id in RUN/run.json and in every checkpoint: a run that is resumed has the same one. Empty
    with debug.rollout_only."""
    continued_step: int = 0
    """Train step after which the run goes on, so that what was logged of later ones comes again;
    0 for a new run."""

    eval_every: int = 0
    """Steps between evaluations, of which one more comes at the end; 0: that one alone."""

    @property
    def first_step(self) -> int:
        """Step of the first line that is going to come: a new run evaluates at step 0."""
        return self.continued_step + 1 if self.continued_step else 0

    @property
    def name(self) -> str:
        """What a person calls the run."""
        return self.config.tracking.run_name or self.directory.path.name


class Sink(Protocol):
    """Made once, on rank 0, with a `RunInfo`. What it raises is named once; it is left out then."""

    def log(self, metrics: Metrics) -> None:
        """Take one line of metrics: a train step or an evaluation."""

    def text(self, line: str) -> None:
        """Take a line for the person who watches."""

    def close(self) -> None:
        """Write what is left; the run has ended."""


@runtime_checkable
class TakesDetails(Protocol):
    """A sink that also has a method for what a line of metrics cannot hold."""

    def details(self, details: Details) -> None:
        """Take the distributions and the sample rollouts of a train step, after its metrics."""


@runtime_checkable
class TakesImportant(Protocol):
    """A sink that tells what must not be missed from other lines, which `text` gets."""

    def important(self, line: str) -> None:
        """Take a warning, or a line about how the run has ended."""


def is_failing() -> bool:
    """Whether `close` is called because an error ends the run."""
    return sys.exc_info()[0] is not None
