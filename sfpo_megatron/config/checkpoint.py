"""The `checkpoint` section of the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfpo_megatron.config.fields import at_least, positive


@dataclass(kw_only=True, frozen=True, slots=True)
class CheckpointConfig:
    """The state of the run in output_dir/checkpoints, and what a stop request does
    (docs/checkpoints.md)."""

    every: int = 50
    """Train steps between checkpoints; the last step gets one too. 0: none, and SIGTERM or SIGUSR1
    ends the run where it stands."""
    keep_last: int = 2
    """Checkpoints that are kept; an older one goes once a newer one has been verified."""
    keep_best: bool = True
    """Keep also the one whose step had the best evaluation."""
    async_save: bool = False
    """Write in a process beside the training; the step waits for the copy to host memory only."""
    resume: str = "auto"
    """How the first start of a run begins; one that has begun (run.json) continues from its newest
    good checkpoint in any case, unless --fresh. auto: from the newest good checkpoint of
    output_dir, if there is one; never: begin a new run (old checkpoints are kept under another
    name); else a directory: a checkpoint, or a folder of them. One by Megatron-LM gives weights."""
    format: Literal["native", "megatron_lm"] = "native"
    """native: step_0000050/; megatron_lm: iter_0000050/ and latest_checkpointed_iteration.txt, with
    the arguments that Megatron-LM looks for. The tensors are the same."""
    must_save_within_s: float | None = None
    """Seconds from a stop request to the end of the save. If the running generation or passes would
    take longer, the step is given up and redone when the run is resumed. null: as long as the step
    takes; in a job by `sfpo-megatron slurm`, its --save-budget."""
    stop_before_walltime_s: float | None = None
    """Stop this long before the end of the Slurm job (SLURM_JOB_END_TIME); null: do not look."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every")
        at_least(self, 1, "keep_last")
        positive(self, "must_save_within_s", "stop_before_walltime_s")
