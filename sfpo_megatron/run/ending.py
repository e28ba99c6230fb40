"""How a finished run ends: the policy as Hugging Face files, a table, a plot, a page."""

from __future__ import annotations

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.plot import plot
from sfpo_megatron.outputs.report.reading import ReportError
from sfpo_megatron.outputs.report.writing import write_report
from sfpo_megatron.outputs.table import summary_table
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.source import MegatronWeightSource
from sfpo_megatron.run.opening import OpenedRun


def finish(config: RunConfig, opened: OpenedRun, source: MegatronWeightSource) -> None:
    """Export the policy to RUN/hf, then make the table, the plot and the report of what the run has
    written. The devices are the trainer's. Collective."""
    directory = opened.directory
    if not config.debug.rollout_only:
        with doing("export"):
            export_hf(
                source,
                directory.hf,
                model_path=config.model.path,
                dtype=config.model.dtype,
                is_writer=opened.is_main,
            )
    if opened.is_main and directory.metrics.exists():
        with span("report"):
            plot(directory.metrics, directory.plot)
            said = _report(directory)
        continued = opened.start.continued
        resumed = continued.step if continued is not None else None
        opened.important(summary_table(directory.metrics, resumed_after=resumed))
        opened.important(f"policy: {directory.hf}   curve: {directory.plot}")
        opened.important(said)


def _report(directory: RunDirectory) -> str:
    """Write RUN/report.html; what is to be said of it. A page must not end a run that has ended."""
    try:
        return f"report: {write_report([str(directory.path)])}"
    except (ReportError, OSError) as error:
        return f"warning: no report ({error})"
