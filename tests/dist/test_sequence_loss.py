"""A sequence-level loss with everything on gives the same training under every layout.

GSPO's ratio, per-rollout means, masked rollouts, importance weights of whole rollouts, rejection, a
KL penalty: two SFPO steps at DP2, PP2 and TP2 against TP1. The formulas are held by the unit tests.
Not exercised: bf16, context parallelism (a sequence would be split).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import references
import torch
from harness import DP2, PP2, TP1, TP2, on_ranks
from torch import Tensor

from sfpo_megatron.config.objective import (
    ImportanceSamplingConfig,
    KLConfig,
    ObjectiveConfig,
    OverlongConfig,
)
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

OBJECTIVE = ObjectiveConfig(
    ratio="sequence",
    clip_low=0.02,
    clip_high=0.02,
    aggregation="seq_mean_token_mean",
    zero_variance_groups="mask",
    entropy_coef=references.ENTROPY_COEF,
    overlong=OverlongConfig(mask_truncated=True),
    kl=KLConfig(coef=0.05),
    importance_sampling=ImportanceSamplingConfig(weight="sequence", reject="sequence", low=0.9),
)


def train(
    bench: Workbench, *, steps: int, **transformer: Any
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """(what each optimizer step found, Hugging Face weights)."""
    from sfpo_megatron.mcore.reference_policy import ReferencePolicy

    policy = bench.policy(objective=OBJECTIVE, transformer=transformer)
    reference, snapshot, history = ReferencePolicy(policy), SlowSnapshot(policy.shards), []
    for step in range(steps):
        minibatches = bench.prepared(policy, step)
        for microbatch in (m for part in minibatches for m in part.microbatches):
            if microbatch.old_logprobs is not None:  # a generator that differs, by token and label
                noise = 0.3 * torch.sin(microbatch.labels * 1.0)
                microbatch.generator_logprobs = microbatch.old_logprobs - noise
        reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
        results = sfpo_step(
            bench.one_pass(policy, minibatches), snapshot, num_fast_passes=1, alpha=0.8
        )
        for one in (m for result in results for m in result.minibatches):
            assert one.grad_norm > 0 and not one.skipped
            history.append(
                {"loss": one.loss, "grad_norm": one.grad_norm, **one.stats, **one.maxima}
            )
    return history, bench.hf_weights(policy)


def compare(
    got: tuple[list[dict[str, float]], dict[str, Tensor]],
    wanted: tuple[list[dict[str, float]], dict[str, Tensor]],
) -> None:
    """fp32 sums in another order, amplified by Adam within a step: 1e-4 relative plus 1e-5; weights
    within 1e-4, as in test_training.py."""
    for step, (found, expected) in enumerate(zip(got[0], wanted[0], strict=True)):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), f"optimizer step {step}"
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=0, atol=1e-4)


@on_ranks(TP1, DP2, PP2, TP2, needs=TP1, full=["TP2"])
def test_every_layout_trains_like_tp1(bench: Workbench) -> None:
    got = train(bench, steps=2)
    if bench.layout != TP1:
        compare(got, bench.load("sequence_loss"))
        return
    bench.save("sequence_loss", *got)
    for name in ("clip_frac_low", "clip_frac_high", "mismatch_rejected", "ref_kl"):
        assert 0 < max(found[name] for found in got[0]) < 1, f"{name} is not exercised"


@on_ranks(DP2)
def test_with_megatrons_per_token_loss(bench: Workbench) -> None:
    """calculate_per_token_loss: Megatron divides the gradient by the token count, which is not this
    loss's normalizer."""
    compare(train(bench, steps=1, calculate_per_token_loss=True), train(bench, steps=1))


@on_ranks(DP2)
def test_the_logged_loss_is_a_mean_over_rollouts(bench: Workbench) -> None:
    """Before any update every ratio is 1: minus the mean advantage of the rollouts in the loss."""
    from sfpo_megatron.objectives.advantage import grpo

    objective = ObjectiveConfig(
        aggregation="seq_mean_token_mean", overlong=OverlongConfig(mask_truncated=True)
    )
    policy = bench.policy(objective=objective)
    minibatches = bench.prepared(policy)
    saved = references.load_batch(bench.directory, 0)
    advantages = grpo(saved["rewards"], references.GROUP_SIZE, ObjectiveConfig())
    mine = slice(0, advantages.numel() // len(minibatches))
    in_loss = saved["response_lengths"][mine] < 11  # as the workbench has it
    wanted = -float(advantages[mine][in_loss].double().mean())
    assert abs(wanted) > 0.01, "nothing to tell a wrong divisor by"
    (first, *_) = bench.one_pass(policy, minibatches)().minibatches
    assert first.loss == pytest.approx(wanted, rel=1e-4)


@on_ranks(DP2, per_token=[False, True])
def test_every_rollout_masked_out(bench: Workbench, per_token: bool) -> None:
    """No token is left in either minibatch: no loss, a gradient of 0, nothing skipped, no NaN."""
    objective = ObjectiveConfig(aggregation="seq_mean_token_mean", entropy_coef=0.01)
    transformer = {"calculate_per_token_loss": per_token}
    policy = bench.policy(objective=objective, transformer=transformer)
    minibatches = [
        replace(minibatch, global_valid_tokens=0, global_num_sequences=0)
        for minibatch in bench.prepared(policy)
    ]
    for microbatch in (m for part in minibatches for m in part.microbatches):
        microbatch.loss_mask.zero_()
    result = bench.one_pass(policy, minibatches)()
    assert result.num_tokens == 0 and math.isnan(result.mean_of("ratio_mean"))
    for one in result.minibatches:
        assert one.loss == one.entropy == one.grad_norm == 0 and not one.skipped
