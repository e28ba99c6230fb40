"""What a metrics sink is: somewhere that a run's metrics and progress lines go.

`console` and `jsonl` are built in; `tracking.sinks` takes a class of your own too (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory

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


class Sink(Protocol):
    """Made once, on rank 0, with a `RunInfo`. What it raises is named once; it is left out then."""

    def log(self, metrics: Metrics) -> None:
        """Take one line of metrics: a train step or an evaluation."""

    def text(self, line: str) -> None:
        """Take a line for the person who watches."""

    def close(self) -> None:
        """Write what is left; the run has ended."""
