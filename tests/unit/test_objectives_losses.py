"""Every loss, ratio and aggregation against float64 formulas, rollout by rollout; then properties.

The reference knows no packs: it loops over rollouts of the whole minibatch, in float64, and torch's
autograd differentiates it. Ours is float32 over packs of two data-parallel ranks. Bounds: 2e-5
relative (float32 resolves 6e-8, ratios go up to about 10 and a loss sums some hundred tokens), with
1e-6 absolute where terms cancel. Not exercised: the reduction over real ranks (tests/dist).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ragged import MAX_RESPONSE, Ragged, cut, objective_of, ragged, run
from torch import Tensor

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.objective import ObjectiveConfig, OverlongConfig
from sfpo_megatron.objectives.advantage import in_loss
from sfpo_megatron.objectives.sequences import Sequences

RTOL, ATOL = 2e-5, 1e-6


def reference(data: Ragged, config: ObjectiveConfig) -> tuple[float, Tensor, Tensor]:
    """(loss, its gradient by log-prob, by entropy), float64."""
    new = data.new.detach().double().requires_grad_()
    entropy = data.entropy.detach().double().requires_grad_()
    per_rollout = []
    chosen = in_loss(data.batch, config).tolist()
    for index, span in data.responses():
        if not chosen[index]:
            continue
        advantage = data.advantages[index].double()
        logprobs, old = new[span], data.old[span].double()
        ratio = torch.exp(logprobs - old)
        if config.ratio == "sequence":
            ratio = torch.exp((logprobs - old).mean()).expand(logprobs.shape)
        bounded = torch.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        if config.loss == "cispo":
            loss = -bounded.detach() * advantage * logprobs
        elif config.loss == "no_clip":
            loss = -ratio * advantage
        else:
            loss = torch.maximum(-ratio * advantage, -bounded * advantage)
            if config.dual_clip is not None and advantage < 0:
                loss = torch.minimum(loss, -config.dual_clip * advantage)
        per_rollout.append(loss - config.entropy_coef * entropy[span])
    if config.aggregation == "token_mean":
        total = torch.cat(per_rollout).mean()
    elif config.aggregation == "seq_mean_token_mean":
        total = torch.stack([loss.mean() for loss in per_rollout]).mean()
    else:
        total = torch.stack([loss.sum() for loss in per_rollout]).mean()
        if config.aggregation == "token_sum_norm":
            total = total / MAX_RESPONSE
    by_new, by_entropy = torch.autograd.grad(total, [new, entropy], allow_unused=True)
    return total.item(), by_new, by_entropy if by_entropy is not None else torch.zeros_like(new)


LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "clip_higher": {"clip_low": 0.1, "clip_high": 0.4},
    "dual_clip": {"dual_clip": 1.5},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.5},
    "no_clip": {"loss": "no_clip"},
    "entropy": {"entropy_coef": 0.05},
    "masked": {
        "zero_variance_groups": "mask", "entropy_coef": 0.05,
        "overlong": OverlongConfig(mask_truncated=True),
    },
}  # fmt: skip
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str, ratio: Any, aggregation: Any, seed: int) -> None:
    config = ObjectiveConfig(**LOSSES[name], ratio=ratio, aggregation=aggregation)
    data = ragged(seed)
    loss, _ = run(data, config)
    loss.backward()
    value, by_new, by_entropy = reference(data, config)
    assert loss.item() == pytest.approx(value, rel=RTOL, abs=ATOL)
    assert data.new.grad is not None and by_new.count_nonzero() > 10
    scale = by_new.abs().max().item()
    torch.testing.assert_close(data.new.grad.double(), by_new, rtol=RTOL, atol=ATOL * scale)
    if config.entropy_coef:
        assert data.entropy.grad is not None
        torch.testing.assert_close(data.entropy.grad.double(), by_entropy, rtol=RTOL, atol=1e-9)
    else:
        assert data.entropy.grad is None


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_split_does_not_matter(ratio: Any, aggregation: Any) -> None:
    """One rank and four; float32 sums in another order, so not bit for bit."""
    config = ObjectiveConfig(
        ratio=ratio, aggregation=aggregation, overlong=OverlongConfig(mask_truncated=True)
    )
    found = []
    for data_size in (1, 4):
        data = ragged(7)
        loss, stats = run(data, config, data_size=data_size)
        loss.backward()
        assert data.new.grad is not None
        found.append((loss.detach(), stats, data.new.grad))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for one, other in zip(found[0], found[1], strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---- properties ---------------------------------------------------------------------------------


def gradient(data: Ragged, **settings: Any) -> Tensor:
    data.new.grad = None
    run(data, ObjectiveConfig(**settings))[0].backward()
    assert data.new.grad is not None
    return data.new.grad.clone()


def test_gspo_of_one_token_responses_is_grpo() -> None:
    """The geometric mean of one ratio is that ratio."""
    data = ragged(1, equal_lengths=1)
    token, sequence = (run(data, ObjectiveConfig(ratio=r)) for r in ("token", "sequence"))
    assert token == sequence
    assert torch.equal(gradient(data, ratio="token"), gradient(data, ratio="sequence"))


def test_gspo_gives_all_tokens_of_a_rollout_one_gradient() -> None:
    grad = gradient(data := ragged(2), ratio="sequence")
    for _, span in data.responses():
        assert grad[span].unique().numel() == 1


def test_ppo_and_its_first_step() -> None:
    """At ratio 1 every loss with a token ratio has the gradient of REINFORCE, -A / N."""
    for settings in ({}, {"loss": "cispo"}, {"loss": "no_clip"}, {"dual_clip": 3.0}):
        data = ragged(3, spread=0.0)
        grad = gradient(data, **settings)
        count = data.batch.response_lengths.sum()
        for index, span in data.responses():
            expected = (-data.advantages[index] / count).expand(grad[span].shape)
            torch.testing.assert_close(grad[span], expected)


def test_cispo_gradient_ignores_the_clip_side() -> None:
    """It is -clip(r) A / N whatever the sign of A; PPO's vanishes on one side."""
    data = ragged(4)
    grad = gradient(data, loss="cispo", clip_low=0.2, clip_high=0.2)
    ppo = gradient(data, clip_low=0.2, clip_high=0.2)
    count = data.batch.response_lengths.sum()
    for index, span in data.responses():
        weight = (data.new[span] - data.old[span]).exp().clip(0.8, 1.2)
        torch.testing.assert_close(grad[span], -weight * data.advantages[index] / count)
        assert grad[span].count_nonzero() == grad[span].numel()
    assert ppo.count_nonzero() < grad.count_nonzero() - 10


def test_dual_clip_bounds_the_loss_of_negative_advantages() -> None:
    data = ragged(5, spread=3.0)
    data.advantages = -data.advantages.abs()
    bound = 3.0 * (-data.advantages * data.batch.response_lengths).sum()
    settings = {"aggregation": "seq_mean_token_sum"}
    free, _ = run(data, ObjectiveConfig(**settings))
    bounded, _ = run(data, ObjectiveConfig(dual_clip=3.0, **settings))
    assert bounded < bound / data.batch.num_rollouts < free
    data.advantages = -data.advantages  # it says nothing where the advantage is positive
    same = [run(data, ObjectiveConfig(dual_clip=c, **settings))[0] for c in (3.0, None)]
    assert torch.equal(*same)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_sequence_means_are_token_means_at_equal_lengths(ratio: Any) -> None:
    data = ragged(6, equal_lengths=5)
    scales = {"token_mean": 1, "seq_mean_token_mean": 1, "seq_mean_token_sum": 1 / 5}
    scales["token_sum_norm"] = MAX_RESPONSE / 5
    wanted = gradient(data, ratio=ratio)
    for aggregation, scale in scales.items():
        found = gradient(data, ratio=ratio, aggregation=aggregation) * scale
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_a_batch_that_is_masked_out_has_no_loss_and_no_nan() -> None:
    data = ragged(8)
    data.batch.finished[:] = False
    config = ObjectiveConfig(
        overlong=OverlongConfig(mask_truncated=True), aggregation="seq_mean_token_mean"
    )
    objective = objective_of(config)
    for part in cut(data, config):
        assert part.global_valid_tokens == part.global_num_sequences == 0
        for microbatch in part.microbatches:
            labels = microbatch.labels
            terms = objective(data.new[labels], data.entropy[labels], microbatch)
            terms.loss.backward()
            assert terms.loss == 0
            assert not any(v.any() for v in (*terms.sums.values(), *terms.maxima.values()))
    assert data.new.grad is not None and not data.new.grad.any()


def test_sums_and_means_over_the_sequences_of_a_pack() -> None:
    """Ragged, one sequence without a response token, padding at the end."""
    mask = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    sequences = Sequences(torch.tensor([0, 4, 6, 8, 10], dtype=torch.int32), mask)
    values = torch.arange(10.0)
    assert sequences.ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert sequences.num_tokens.tolist() == [2, 0, 1, 0]
    assert sequences.sum(values).tolist() == [3, 0, 6, 0]
    assert sequences.mean(values).tolist() == [1.5, 0, 6, 0]
    assert sequences.on_tokens(torch.tensor([1.0, 2, 3, 4]))[[0, 5, 7, 9]].tolist() == [1, 2, 3, 4]


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"loss": "ppo"}, "loss"),
        ({"loss": "module.function"}, "loss"),
        ({"loss": "a b:c"}, "loss"),
        ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"loss_args": {"beta": 1}}, "loss_args"),
        ({"advantage": "median"}, "advantage"),
        ({"advantage_args": {"beta": 1}}, "advantage_args"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as refused:
        ObjectiveConfig(**settings)
    assert refused.value.where == field
