"""The correction for the generator's probabilities, against float64 formulas rollout by rollout."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from ragged import Ragged, ragged, run

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.objective import ImportanceSamplingConfig, ObjectiveConfig
from sfpo_megatron.objectives.mismatch import mismatch_weights
from sfpo_megatron.objectives.sequences import Sequences

WEIGHTS, REJECTS = ("none", "token", "sequence"), ("none", "token", "sequence")
ON = [pair for pair in product(WEIGHTS, REJECTS) if pair != ("none", "none")]
BOUNDS = {"max_weight": 1.15, "low": 0.8, "high": 1.25}


def settings(weight: Any, reject: Any, **bounds: float) -> ObjectiveConfig:
    correction = ImportanceSamplingConfig(weight=weight, reject=reject, **(bounds or BOUNDS))
    return ObjectiveConfig(importance_sampling=correction)


def weights_of(data: Ragged, config: ImportanceSamplingConfig) -> list[list[float]]:
    """w of each token of each rollout, by the formulas."""
    found = []
    generated = data.batch.generator_logprobs.split(data.batch.response_lengths.tolist())
    for (_, span), mu in zip(data.responses(), generated, strict=True):
        gaps = (data.old[span].double() - mu.double()).tolist()
        weights = [1.0] * len(gaps)
        if config.weight == "token":
            weights = [min(math.exp(g), config.max_weight) for g in gaps]
        if config.weight == "sequence":
            weights = [min(math.exp(sum(gaps)), config.max_weight)] * len(gaps)
        ratios = [math.exp(g) for g in gaps]
        if config.reject == "sequence":
            ratios = [math.exp(sum(gaps) / len(gaps))] * len(gaps)
        if config.reject != "none":
            inside = [config.low <= r <= config.high for r in ratios]
            weights = [w * i for w, i in zip(weights, inside, strict=True)]
        found.append(weights)
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("weight", "reject"), ON)
def test_gradient_and_statistics(weight: str, reject: str, seed: int) -> None:
    """At ratio 1 the gradient of a token is -w A / N: the weight alone. Bound 1e-5: float32."""
    data, config = ragged(seed, spread=0.0), settings(weight, reject)
    loss, stats = run(data, config)
    loss.backward()
    assert data.new.grad is not None
    wanted = weights_of(data, config.importance_sampling)
    flat = [w for rollout in wanted for w in rollout]
    for (index, span), weights in zip(data.responses(), wanted, strict=True):
        expected = -torch.tensor(weights) * data.advantages[index] / len(flat)
        torch.testing.assert_close(data.new.grad[span], expected, rtol=1e-5, atol=1e-8)
    assert stats["mismatch_weight_mean"] == pytest.approx(sum(flat), rel=1e-5)
    assert stats["mismatch_rejected"] == sum(w == 0 for w in flat)
    if reject != "none":
        assert 0 < stats["mismatch_rejected"] < len(flat)
    if weight == "token":
        assert config.importance_sampling.max_weight in flat and len(set(flat)) > 10


@pytest.mark.parametrize(("weight", "reject"), ON)
@pytest.mark.parametrize("loss", ["ppo_clip", "cispo"])
def test_equal_log_probs_change_nothing(weight: str, reject: str, loss: str) -> None:
    """Bit for bit, value and gradient."""
    found = []
    for config in (ObjectiveConfig(), settings(weight, reject)):
        data = ragged(3)
        mask = torch.cat([data.old[span] for _, span in data.responses()])
        data.batch = replace(data.batch, generator_logprobs=mask)
        value, _ = run(data, replace(config, loss=loss))
        value.backward()
        found.append((value.detach(), data.new.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None and torch.equal(found[0][1], found[1][1])


def test_icepop_is_token_weight_with_token_rejection() -> None:
    """At the default bounds: the ratio inside [0.5, 2], 0 outside."""
    generator = torch.tensor([-1.0, -1.0, -1.0, -1.0, 5.0])
    old = generator + torch.tensor([0.6, -0.6, 0.8, -0.8, 9.0])
    mask = torch.tensor([True, True, True, True, False])
    sequences = Sequences(torch.tensor([0, 3, 5], dtype=torch.int32), mask)
    icepop = ImportanceSamplingConfig(weight="token", reject="token")
    weights, rejected = mismatch_weights(old, generator, mask, sequences, icepop)
    assert weights.tolist() == pytest.approx([math.exp(0.6), math.exp(-0.6), 0, 0, 1])
    assert rejected.tolist() == [False, False, True, True, False]


def test_the_entropy_bonus_is_not_weighted() -> None:
    data = ragged(5)
    config = replace(settings("token", "token"), entropy_coef=0.1)
    run(data, config)[0].backward()
    assert data.entropy.grad is not None
    count = int(data.batch.response_lengths.sum())
    spans = torch.cat([data.entropy.grad[span] for _, span in data.responses()])
    torch.testing.assert_close(spans, torch.full((count,), -0.1 / count))


def test_off_by_default() -> None:
    assert not ObjectiveConfig().importance_sampling.is_on
    _, stats = run(ragged(0), ObjectiveConfig())
    assert not any(name.startswith("mismatch") for name in stats)


@pytest.mark.parametrize("wrong", [{"low": 1.5}, {"high": 0.5}, {"max_weight": 0.0}], ids=str)
def test_bounds_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=next(iter(wrong))):
        ImportanceSamplingConfig(**wrong)
