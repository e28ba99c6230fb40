"""The KL penalty to a reference policy: estimators, in the loss, in the reward.

Not exercised here: the swap of the reference's weights (tests/dist/test_reference.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ragged import Ragged, cut, objective_of, ragged
from torch import Tensor

from sfpo_megatron.batching import BatchLayout, build_minibatches, set_advantages
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig, OverlongConfig
from sfpo_megatron.objectives.advantage import in_loss, shaped_rewards
from sfpo_megatron.objectives.kl import kl_estimate

ESTIMATORS = ("k1", "k2", "k3")


def plain(d: Tensor, estimator: str) -> Tensor:
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[estimator]


def estimate(logprobs: Tensor, ref: Tensor, estimator: Any) -> Tensor:
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    return kl_estimate(logprobs, ref, mask, KLConfig(coef=1.0, estimator=estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_their_mean_is_the_kl(estimator: str) -> None:
    """k1 and k3 exactly, as expectations over a distribution of 20; k2 to second order."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20, generator=random, dtype=torch.float64)
    near = logits + 0.1 * torch.randn(20, generator=random, dtype=torch.float64)
    policy, ref = torch.log_softmax(logits, 0), torch.log_softmax(near, 0)
    kl = (policy.exp() * (policy - ref)).sum().item()
    mean = (policy.exp() * estimate(policy, ref, estimator)).sum().item()
    assert mean == pytest.approx(kl, rel=0.1 if estimator == "k2" else 1e-9)


def test_k3_is_not_negative_and_flat_at_the_reference() -> None:
    ref = -3 * torch.rand(1000, generator=torch.Generator().manual_seed(1))
    logprobs = ref + torch.randn(1000, generator=torch.Generator().manual_seed(2))
    assert (estimate(logprobs, ref, "k3") >= 0).all()
    logprobs = ref.clone().requires_grad_()
    value = estimate(logprobs, ref, "k3")
    value.sum().backward()
    assert not value.any() and logprobs.grad is not None and not logprobs.grad.any()


def with_reference(data: Ragged, config: ObjectiveConfig, ref: Tensor) -> tuple[Tensor, float]:
    """(loss of the minibatch, sum of `ref_kl`)."""
    objective, loss, kl = objective_of(config), torch.zeros(()), 0.0
    parts = cut(data, config)
    for microbatch in (m for part in parts for m in part.microbatches):
        labels = microbatch.labels
        microbatch.ref_logprobs = ref[labels]
        terms = objective(data.new[labels], data.entropy[labels], microbatch)
        loss = loss + terms.loss
        kl += terms.sums["ref_kl"].item()
    return loss / objective.normalizer(parts[0]), kl


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_the_loss(estimator: Any, aggregation: Any) -> None:
    """Beyond the loss without it: coef x the aggregate, value and gradient, against float64.
    Bound 2e-5: float32, as in test_objectives_losses.py."""
    data = ragged(3)
    ref = data.old + 0.3 * torch.randn(data.old.shape, generator=torch.Generator().manual_seed(5))
    kl = KLConfig(coef=0.2, estimator=estimator)
    config = ObjectiveConfig(loss="no_clip", aggregation=aggregation, kl=kl)
    loss, kl_sum = with_reference(data, config, ref)
    loss.backward()
    new = data.new.detach().double().requires_grad_()
    means, flat, surrogate = [], [], []
    for index, span in data.responses():
        estimates = plain(ref[span].double() - new[span], estimator)
        ratio = (new[span] - data.old[span].double()).exp()
        token = -ratio * data.advantages[index].double() + 0.2 * estimates
        flat.append(estimates.detach())
        surrogate.append(token)
        means.append(token.mean())
    wanted = torch.cat(surrogate).mean()
    if aggregation == "seq_mean_token_mean":
        wanted = torch.stack(means).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5, abs=1e-6)
    assert data.new.grad is not None and new.grad is not None
    torch.testing.assert_close(data.new.grad.double(), new.grad, rtol=2e-5, atol=1e-7)
    assert kl_sum == pytest.approx(torch.cat(flat).sum().item(), rel=1e-4, abs=1e-5)


def test_in_the_reward_it_is_not_in_the_loss() -> None:
    found = []
    for where, coef in (("reward", 0.5), ("loss", 0.5), ("loss", 1e-30)):
        data = ragged(4)
        config = ObjectiveConfig(kl=KLConfig(coef=coef, where=where))  # type: ignore[arg-type]
        loss, kl = with_reference(data, config, data.old)
        assert kl > 0
        found.append(loss.item())
    assert found[0] == found[2] != found[1]


def test_rewards_as_the_objective_shapes_them() -> None:
    batch = ragged(0).batch
    config = ObjectiveConfig(
        kl=KLConfig(coef=0.5, where="reward"), overlong=OverlongConfig(buffer_tokens=4)
    )
    kl = torch.arange(16, dtype=torch.float64)
    found = shaped_rewards(batch, 12, config, kl)
    for i, (reward, length) in enumerate(zip(batch.rewards, batch.response_lengths, strict=True)):
        wanted = float(reward) - max(0, int(length) - 8) / 4 - 0.5 * i
        assert found[i].item() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(shaped_rewards(batch, 12, ObjectiveConfig()), batch.rewards)


@pytest.mark.parametrize("mask_truncated", [True, False])
def test_advantages_set_later_are_those_of_a_new_cut(mask_truncated: bool) -> None:
    """Bit for bit, padding and masked-out rollouts included."""
    data = ragged(6)
    config = ObjectiveConfig(overlong=OverlongConfig(mask_truncated=mask_truncated))
    layout = BatchLayout(minibatches=2, data_rank=1, data_size=2, max_tokens=40, pad_multiple=8)
    chosen = in_loss(data.batch, config)
    wanted = build_minibatches(data.batch, data.advantages, layout, in_loss=chosen)
    found = build_minibatches(data.batch, torch.zeros(16), layout, in_loss=chosen)
    set_advantages(found, data.advantages)
    padding, seen = 0, []
    for one, other in zip(wanted, found, strict=True):
        for a, b in zip(one.microbatches, other.microbatches, strict=True):
            assert torch.equal(a.advantages, b.advantages) and a.rollouts.equal(b.rollouts)
            assert a.rollouts.numel() == a.cu_seqlens.numel() - 1
            padding += int((a.rollouts < 0).sum())
            seen += [r for r in a.rollouts.tolist() if r >= 0]
    assert padding > 0 and len(set(seen)) == len(seen) == 8


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(FieldError, match="coef"):
        KLConfig(coef=-1.0)
