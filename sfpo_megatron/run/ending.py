"""How a finished run ends: the policy as Hugging Face files, a table, a plot, a page."""

from __future__ import annotations

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.outputs.shown import shown
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
        continued = opened.start.continued
        for said in shown(directory, resumed_after=continued.step if continued else None):
            opened.important(said)
