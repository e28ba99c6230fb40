"""The metrics of what a train step costs: seconds, tokens a second, memory, blocks of the engines.

They are part of its line, as those in `metric_list.py` are, but differ from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from sfpo_megatron.outputs.declared import Metric

T = TypeVar("T")

COSTS = (
    Metric("time/generate_s", "seconds", "From submit to the last token."),
    Metric(
        "time/reward_s",
        "seconds",
        "Scoring that was left after the last token; the rest ran meanwhile.",
    ),
    Metric(
        "time/logprob_s",
        "seconds",
        "Computing `old_logprobs`, but for the first minibatch.",
        when="two minibatches a pass or more; not with `objective.old_logprobs: generator`",
    ),
    Metric(
        "time/reference_s",
        "seconds",
        "The reference's weights in and out, and its forward.",
        when="`objective.kl`",
    ),
    Metric("time/passes_s", "seconds", "All passes."),
    Metric(
        "time/reposition_s",
        "seconds",
        "Snapshot, reposition and publish: what `sfpo_step` took beyond its passes.",
    ),
    Metric(
        "time/wait_s",
        "seconds",
        "Until the next step's generation had ended.",
        when="`rollout.async_steps: 1`",
    ),
    Metric("time/refit_s", "seconds", "Writing the weights out and loading them into the engines."),
    Metric(
        "time/onload_s",
        "seconds",
        "Until engines slept and the trainer's state was back on the device.",
        when="`rollout.placement: colocated`",
    ),
    Metric(
        "time/offload_s",
        "seconds",
        "Until that state was in host memory and the engines had theirs, within `time/refit_s`; "
        "measured at the last move before this line.",
        when="`rollout.placement: colocated`",
    ),
    Metric(
        "time/step_s",
        "seconds",
        "The whole train step, without evaluation. On a GPU this and its phases are by the GPU's "
        "clock: each ends when its kernels have.",
    ),
    Metric(
        "time/checkpoint_s",
        "seconds",
        "How long the loop stood still for checkpoints after the step before this one.",
        when="a checkpoint since the line before",
    ),
    Metric(
        "speed/generation_tokens_per_s",
        "tokens/s",
        "Response tokens of the batch by `time/generate_s`; those of dropped groups are not "
        "counted.",
        when="engines",
    ),
    Metric(
        "speed/training_tokens_per_s",
        "tokens/s",
        "Prompt and response tokens of the batch, once for each pass, by `time/passes_s`.",
    ),
    Metric(
        "speed/tokens_per_s",
        "tokens/s",
        "Prompt and response tokens of the batch by `time/step_s`.",
    ),
    Metric(
        "speed/tokens_per_s_per_device",
        "tokens/s",
        "The same for each device: GPUs, or processes on CPU, of the trainer and of dedicated "
        "engines.",
    ),
    Metric(
        "speed/model_flops_per_s",
        "FLOP/s",
        "Model FLOPs of the passes (forward and backward, causal attention, no recomputation) by "
        "`time/passes_s`, of the whole trainer.",
    ),
    Metric(
        "speed/mfu",
        "share",
        "`speed/model_flops_per_s` of the trainer's peak. On GPUs that is the vendor's 16-bit "
        "peak; on CPU a matrix product of the model's dtype, timed once, after the first step of "
        "a start, on all ranks in the same moment and summed over them.",
        when="CPU; GPUs that `planner/hardware.py` knows, with `model.dtype` of 16 bits",
    ),
    Metric(
        "ranks/PHASE_max_s",
        "seconds",
        "Longest `time/PHASE_s` of a rank, for logprob, reference, passes, reposition, refit, "
        "onload and offload. A pass, a refit and an offload wait for the other ranks: who computes "
        "longer than they do shows best in logprob, who copies longer in onload.",
        when="several ranks",
    ),
    Metric("ranks/PHASE_min_s", "seconds", "The shortest.", when="several ranks"),
    Metric("ranks/PHASE_slowest", "", "The rank that took the longest.", when="several ranks"),
    Metric(
        "memory/PHASE_peak_bytes",
        "bytes",
        "Most memory of a rank during a phase: allocated by torch on the GPU, or resident in the "
        "process on CPU; the largest of all ranks.",
    ),
    Metric(
        "kv_cache_usage_max",
        "share",
        "Largest share of its blocks for keys and values that an engine had in use, for this "
        "step's rollouts.",
        when="engines",
    ),
    Metric(
        "num_preemptions",
        "rollouts",
        "Times that an engine took a rollout's blocks away for want of free ones; it is computed "
        "again.",
        when="engines",
    ),
    Metric(
        "engines/queue_s",
        "seconds",
        "How long a request of a rollout (or of one turn of it) waited in its engine until it was "
        "first scheduled, on average: more than moments where an engine has more rollouts than it "
        "runs at once.",
        when="engines",
    ),
    Metric(
        "engines/busy",
        "share",
        "Share of `time/generate_s` in which an engine ran at least one request: the mean over the "
        "engines. The rest it waited for the longest rollouts of other engines, or for "
        "environments.",
        when="engines",
    ),
)


EVALUATION_TIME = Metric("time/evaluate_s", "seconds", "How long the evaluation took.")
"""What is such a cost on a line of an evaluation."""


def without_costs(line: Mapping[str, T]) -> dict[str, T]:
    """A line without what differs between two runs that do the same."""
    return {
        k: v
        for k, v in line.items()
        if not any(cost.matches(k) for cost in (*COSTS, EVALUATION_TIME))
    }
