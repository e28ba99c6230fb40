"""The metrics that a run logs: every key of metrics.jsonl, with its unit and its meaning.

docs/outputs.md is made from this (`python tools/doc_tables.py`), and tests hold the lines of real
runs to it; `declared.py` says how a name is read, `cost_metrics.py` has what a step costs.
"""

from __future__ import annotations

from dataclasses import replace

from sfpo_megatron.outputs.cost_metrics import EVALUATION_TIME
from sfpo_megatron.outputs.declared import Metric

_PREDICTED = "`sfpo.trajectory: predicted`, while the gate is open"

TRAIN_STEP = (
    Metric("step", "", "Train step, from 1."),
    Metric("num_rollouts", "rollouts", "Used so far, this step included."),
    Metric("reward_mean", "", "Mean reward of the batch."),
    Metric(
        "reward/NAME",
        "",
        "Mean over the rollouts that have it of an entry that the reward returned besides the "
        "reward; of a sum, of each function's reward.",
        when="a reward that returns a mapping, or a sum",
    ),
    Metric("reward_p10", "", "Tenth percentile of the rewards."),
    Metric("reward_p50", "", "Their median."),
    Metric("reward_p90", "", "Their ninetieth percentile."),
    Metric("reward_max", "", "Their maximum."),
    Metric(
        "accuracy",
        "share",
        "Rollouts of the batch with a reward of 1; of a sum, with 1 of its first function.",
    ),
    Metric(
        "zero_variance_groups",
        "share",
        "Groups whose rollouts all got the same reward: they have no gradient.",
    ),
    Metric("solved_by_all", "share", "Groups whose rollouts are all correct."),
    Metric("solved_by_none", "share", "Groups of which none is correct."),
    Metric("truncated", "share", "Rollouts cut at `rollout.max_response_tokens`."),
    Metric(
        "response_tokens_mean",
        "tokens",
        "Mean number of tokens that the model generated in a response, the end-of-sequence token "
        "included; what an environment said ([extend.md](extend.md#environment)) is not counted.",
    ),
    Metric("response_tokens_p10", "tokens", "Tenth percentile of these lengths."),
    Metric("response_tokens_p50", "tokens", "Their median."),
    Metric("response_tokens_p90", "tokens", "Their ninetieth percentile."),
    Metric("response_tokens_max", "tokens", "Their maximum."),
    Metric(
        "num_microbatches",
        "microbatches",
        "Microbatches of a rank in one pass, over its minibatches; the same on every rank.",
    ),
    Metric(
        "padding",
        "share",
        "Share of the packed tokens of all ranks that is padding to what the layout needs, or an "
        "empty microbatch.",
    ),
    Metric(
        "logprob_diff_mean",
        "nats",
        "Mean of |generator - trainer| log-prob over all response tokens, before the update.",
    ),
    Metric("logprob_diff_max", "nats", "Its maximum."),
    Metric(
        "generator_kl",
        "nats",
        "Mean of generator - trainer log-prob, the k1 estimate of KL(generator || trainer).",
    ),
    Metric(
        "loss",
        "",
        "Loss of the slow correction, token-weighted over its minibatches, each before its "
        "optimizer step.",
    ),
    Metric(
        "entropy",
        "nats",
        "Exact mean token entropy of the slow correction, over the same tokens. The gate sees "
        "this.",
    ),
    Metric(
        "grad_norm",
        "",
        "Mean over the slow correction's optimizer steps, before clipping; skipped ones left out.",
    ),
    Metric(
        "clip_frac",
        "share",
        "Response tokens of the slow correction that the clip changed; under `ppo_clip` those have"
        " lost their gradient.",
    ),
    Metric("ppo_kl", "nats", "Mean of old - new log-prob in the slow correction."),
    Metric(
        "ratio_mean_first_pass",
        "",
        "Mean ratio in the first minibatch of the first pass: 1 but for rounding.",
    ),
    Metric(
        "ppo_kl_first_pass",
        "nats",
        "`ppo_kl` there: 0, since this forward itself yields its `old_logprobs` (with a KL penalty "
        "in the reward: but for rounding). With one minibatch a pass, `generator_kl` in its place.",
    ),
    Metric(
        "pass_k/loss",
        "",
        "Loss of pass k: 1 to K are the fast passes, K + 1 is the slow correction. Token-weighted "
        "over its minibatches, each before its optimizer step, as are the means below.",
    ),
    Metric("pass_k/entropy", "nats", "Mean token entropy."),
    Metric("pass_k/grad_norm", "", "The same mean as `grad_norm`, of pass k."),
    Metric(
        "pass_k/ratio_mean",
        "",
        "Mean ratio (of the rollout with `objective.ratio: sequence`): how far this pass is from "
        "the policy before the step. The reposition shows as a jump back.",
    ),
    Metric("pass_k/ratio_max", "", "Its maximum over all tokens."),
    Metric("pass_k/ppo_kl", "nats", "Mean of old - new log-prob."),
    Metric(
        "pass_k/clip_frac_low",
        "share",
        "Tokens that the lower bound of the clip changed. For a loss of your own: ratios below it,"
        " unless the loss says.",
    ),
    Metric(
        "pass_k/clip_frac_high",
        "share",
        "Tokens that the upper bound (or the dual clip) changed.",
    ),
    Metric(
        "pass_k/NAME",
        "",
        "Mean of a statistic that the loss gives.",
        when="a [loss of your own](extend.md#loss)",
    ),
    Metric(
        "ref_kl",
        "nats",
        "Mean of its estimate of KL(policy || reference) in the slow correction.",
        when="`objective.kl`",
    ),
    Metric(
        "mismatch_weight_mean",
        "",
        "Mean weight of a token.",
        when="`objective.importance_sampling`",
    ),
    Metric(
        "mismatch_rejected",
        "share",
        "Tokens rejected.",
        when="`objective.importance_sampling`",
    ),
    Metric(
        "num_passes",
        "passes",
        "Passes of this step: K + 1 (3 of a predicted trajectory), or 1 when the gate is closed.",
    ),
    Metric(
        "prediction/q_mean",
        "",
        "Mean over all elements of the weights of [q](algorithm.md#a-predicted-trajectory-prepo): "
        "how much farther than two passes the reposition started from; 1 is SFPO's own.",
        when=_PREDICTED,
    ),
    Metric("prediction/q_max", "", "Its maximum, at most K/2 + 1.", when=_PREDICTED),
    Metric(
        "prediction/clipped",
        "share",
        "Elements whose q is at that bound: their passes grow, or turn back.",
        when=_PREDICTED,
    ),
    Metric(
        "prediction/inactive",
        "share",
        "Elements whose q is 1: they hardly moved, or their prediction would go less far than the "
        "two passes did. All of them where an optimizer step was skipped.",
        when=_PREDICTED,
    ),
    Metric("num_optimizer_steps", "steps", "Optimizer steps so far, skipped ones included."),
    Metric(
        "num_skipped_steps",
        "steps",
        "Optimizer steps skipped so far, for non-finite gradients.",
    ),
    Metric("sfpo_active", "bool", "This step made fast passes."),
    Metric(
        "weight_version",
        "",
        "The version that the engines hold after this step's refit: the step.",
    ),
    Metric("lr", "", "Learning rate of this step."),
    Metric(
        "staleness",
        "updates",
        "Updates between the weights that generated and those at the update's start: 0, or 1 with "
        "`rollout.async_steps: 1`.",
    ),
    Metric(
        "num_sampling_rounds",
        "rounds",
        "Rounds of prompts; more than 1 only with `rollout.drop_groups`.",
    ),
    Metric("num_groups_generated", "groups", "Groups generated and scored for this step."),
    Metric("num_groups_zero_variance", "groups", "Groups dropped because all rewards were equal."),
    Metric("num_groups_truncated", "groups", "Groups dropped because no response ended by itself."),
    Metric(
        "num_groups_duplicate",
        "groups",
        "Groups dropped because an earlier round had the prompt (at the end of an epoch).",
    ),
    Metric("num_groups_surplus", "groups", "Groups that were good but not needed."),
    Metric(
        "num_groups_taken_back",
        "groups",
        "Groups dropped, then used after all: `rollout.max_rounds` did not fill the batch.",
    ),
    Metric(
        "num_rollouts_spared",
        "rollouts",
        "Not generated, because their prompts were passed over.",
        when="`data.skip_zero_variance`",
    ),
    Metric(
        "explore_solved",
        "",
        "p of prompts whose last groups were all solved: drawn with p^z after z of them.",
        when="`data.skip_zero_variance`",
    ),
    Metric(
        "explore_failed",
        "",
        "The same of prompts whose last groups all failed.",
        when="`data.skip_zero_variance`",
    ),
    Metric(
        "environment/NAME",
        "",
        "What the environment measured: the mean over the rollouts that have it.",
        when="`rollout.environment`",
    ),
    Metric(
        "num_reissued",
        "rollouts",
        "Rollouts asked for again since this start, because their engine was lost.",
    ),
    Metric("num_engine_restarts", "engines", "Engines restarted since this start of the run."),
)
"""A line a train step of `train`."""

EVALUATION = (
    Metric("step", "", "Train steps done."),
    Metric("model", "", "The model that was evaluated.", when="`RUN/eval.jsonl`, for `step`"),
    Metric(
        "eval/accuracy",
        "share",
        "avg@n: rollouts with a reward of 1, over `eval.n` rollouts of every held-out prompt.",
    ),
    Metric(
        "eval/accuracy/SOURCE",
        "share",
        "The same of each source of `data.eval`.",
        when="several sources",
    ),
    Metric("eval/reward_mean", "", "Their mean reward."),
    Metric(
        "eval/reward/NAME",
        "",
        "Mean of an entry that the reward returned besides the reward; of a sum, of each "
        "function's reward.",
        when="a reward that returns a mapping, or a sum",
    ),
    Metric(
        "eval/average",
        "share",
        "Mean of the sources' accuracies: the best checkpoint is chosen by it.",
        when="several sources",
    ),
    Metric("eval/response_tokens_mean", "tokens", "Their mean length."),
    Metric("eval/truncated", "share", "Of those that did not end by themselves."),
    Metric("eval/num_rollouts", "rollouts", "How many; not part of `num_rollouts`."),
    EVALUATION_TIME,
)
"""A line an evaluation of `train`."""

WARM_START = (
    Metric("step", "", "Steps done; 0 only with a held-out loss."),
    Metric(
        "loss",
        "nats",
        "Mean cross-entropy of the learned tokens of the batch, before the step.",
    ),
    Metric("entropy", "nats", "Mean entropy of the policy there."),
    Metric("grad_norm", "", "Before clipping; null for a skipped step."),
    Metric("num_tokens", "tokens", "Learned tokens of the batch."),
    Metric(
        "num_skipped_steps",
        "",
        "1 where the optimizer step was skipped (a gradient that is not finite), else 0.",
    ),
    Metric("lr", "", "Learning rate of the step."),
    Metric(
        "eval/loss",
        "nats",
        "Mean cross-entropy of all learned tokens of the held-out examples.",
        when="held-out examples",
    ),
    Metric("eval/num_tokens", "tokens", "Their number.", when="held-out examples"),
    replace(EVALUATION_TIME, when="held-out examples"),
)
"""A line a step of `sft`, and one of its held-out loss."""
