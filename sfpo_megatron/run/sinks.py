"""Opens what a run writes for those who watch it: its directory, metrics, trace."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.starts import note_start
from sfpo_megatron.outputs.trace import NoTrace, Trace, begin_trace, record_spans
from sfpo_megatron.run.continuing import Start, prepare_output
from sfpo_megatron.tracking.profiler import profile_spans
from sfpo_megatron.tracking.tracker import Tracker


def open_sinks(
    given: RunConfig,
    config: RunConfig,
    start: Start,
    closing: ExitStack,
    *,
    num_steps: int,
    eval_every: int | None = None,
    said: Iterable[str],
) -> Tracker:
    """Make the directory ready, open the sinks, and say what begins. `given`: the config as it was,
    with epochs where `config` has steps; `eval_every`: where it is not that of `eval`; `said`: the
    first lines. Rank 0 alone."""
    directory = RunDirectory.of(config.output_dir)
    found = start.continued
    # The lines of what has run here are not those that lead up to another run's checkpoint.
    own = found is not None and found.directory.resolve().parent == directory.checkpoints.resolve()
    prepare_output(given, up_to_step=start.continued_step if own else 0)
    note_start(directory, run_id=start.run_id, after_step=start.continued_step)
    tracker = closing.enter_context(
        Tracker(
            config,
            num_steps=num_steps,
            eval_every=eval_every,
            run_id=start.run_id,
            continued_step=start.continued_step,
        )
    )
    for line in (*said, start.said):
        tracker.progress(line)
    return tracker


def begin_tracing(config: RunConfig, start: Start, control: ControlGroup) -> Trace | NoTrace:
    """Have what this rank does seen from now on; what draws it, on rank 0. Collective."""
    directory = RunDirectory.of(config.output_dir)
    trace: Trace | NoTrace = NoTrace()
    if config.trace.steps:
        if control.rank == 0:
            steps = (step for step in config.trace.steps if step > start.continued_step)
            trace = begin_trace(directory, steps)
        control.barrier()  # then the others see whether they are to record
        record_spans(directory, f"rank {control.rank}")
    profile_spans(config.trace, directory, control.rank)
    return trace
