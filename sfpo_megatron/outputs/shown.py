"""What a run that has ended is shown by: its table, its plot, its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.plot import plot
from sfpo_megatron.outputs.report.writing import write_report
from sfpo_megatron.outputs.table import summary_table


def shown(directory: RunDirectory, *, resumed_after: int | None) -> Iterator[str]:
    """Write RUN/plot.png and RUN/report.html; what is to be said of them and of the run's metrics.
    Neither a page nor a broken line of metrics may end a run that has ended."""
    file = directory.metrics
    with span("report"):
        table = _made("table", lambda: summary_table(file, resumed_after=resumed_after))
        curve = _made("plot", lambda: _drawn(directory))
        report = _made("report", lambda: f"report: {write_report([str(directory.path)])}")
    yield from (table, f"policy: {directory.hf}   {curve}", report)


def _drawn(directory: RunDirectory) -> str:
    plot(directory.metrics, directory.plot)
    return f"curve: {directory.plot}"


def _made(name: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except (ValueError, OSError) as error:  # ReportError is one
        return f"warning: no {name} ({error})"
