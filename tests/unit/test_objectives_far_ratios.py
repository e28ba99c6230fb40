"""Log-ratios that overflow exp, log-probs of -inf: value and gradient against float64 formulas.

Each case is one response of three tokens, of which the middle one is far off. Bound 1e-5: float32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sfpo_megatron.config.objective import ImportanceSamplingConfig, KLConfig, ObjectiveConfig
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.plugins import LOSS
from sfpo_megatron.types import Microbatch

GAPS = (-200.0, -89.0, -20.5, -1.0, 0.0, 0.1, 1.0, 19.5, 20.5, 88.0, 89.0, 104.0, 200.0)
ADVANTAGES = (-1.0, 0.0, 1.0, 1e30)
NEAR = (-0.7, -1.3)  # log-probs of the tokens beside it, old and new
LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual_clip": {"dual_clip": 3.0},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "no_clip": {"loss": "no_clip"},
}


def microbatch(old: float, advantage: float, *, generator: float, ref: float) -> Microbatch:
    """Four positions, the last one no response token."""
    return Microbatch(
        token_ids=torch.arange(4),
        position_ids=torch.arange(4),
        labels=torch.arange(1, 5),
        loss_mask=torch.tensor([True, True, True, False]),
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        rollouts=torch.tensor([0]),
        max_seqlen=4,
        num_tokens=4,
        advantages=torch.tensor([advantage] * 3 + [0.0]),
        generator_logprobs=torch.tensor([NEAR[0], generator, NEAR[1], 0.0]),
        old_logprobs=torch.tensor([NEAR[0], old, NEAR[1], 0.0]),
        ref_logprobs=torch.tensor([NEAR[0], ref, NEAR[1], 0.0]),
    )


def ours(
    config: ObjectiveConfig,
    new: float,
    old: float,
    advantage: float,
    *,
    generator: float | None = None,
    ref: float = -1.0,
) -> tuple[float, Tensor, dict[str, float]]:
    """(loss, gradient by log-prob [3], statistics)."""
    objective = PolicyObjective(
        config=config, loss=LOSS.load(config.loss), max_response_tokens=4, temperature=1.0
    )
    logprobs = torch.tensor([NEAR[0], new, NEAR[1], 0.0], requires_grad=True)
    pack = microbatch(old, advantage, generator=old if generator is None else generator, ref=ref)
    terms = objective(logprobs, torch.zeros(4), pack)
    terms.loss.backward()
    assert logprobs.grad is not None and logprobs.grad[3] == 0
    stats = {name: value.item() for name, value in (terms.sums | terms.maxima).items()}
    return terms.loss.item(), logprobs.grad[:3].double(), stats


def reference(
    config: ObjectiveConfig, new: float, old: float, advantage: float
) -> tuple[float, Tensor]:
    """Token by token, with math.exp: the clip's cases spelled out, derivatives by hand."""
    news, olds = (NEAR[0], new, NEAR[1]), (NEAR[0], old, NEAR[1])
    gaps = [a - b for a, b in zip(news, olds, strict=True)]
    share = 1.0  # of a token's gradient by its ratio's exponent that comes from itself
    if config.ratio == "sequence":
        gaps, share = [sum(gaps) / 3] * 3, 1 / 3
    low, high = 1 - config.clip_low, 1 + config.clip_high
    value, by_exponent, direct = 0.0, [0.0] * 3, [0.0] * 3
    for i, gap in enumerate(gaps):
        ratio = math.exp(min(gap, 20.0))
        slope = ratio if gap <= 20 else 0.0  # d ratio / d gap
        clipped = min(max(ratio, low), high)
        if config.loss == "cispo":
            value -= clipped * advantage * news[i]
            direct[i] = -clipped * advantage
            continue
        held = (ratio > high and advantage > 0) or (ratio < low and advantage < 0)
        if config.loss == "no_clip":
            held = False
        token = -(clipped if held else ratio) * advantage
        if config.dual_clip is not None and advantage < 0 and token > -config.dual_clip * advantage:
            token, held = -config.dual_clip * advantage, True
        value += token
        by_exponent[i] = 0.0 if held else -advantage * slope
    if config.ratio == "sequence":
        by_exponent = [sum(by_exponent) * share] * 3
    total = [a + b for a, b in zip(by_exponent, direct, strict=True)]
    return value, torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str, ratio: Any) -> None:
    config = ObjectiveConfig(**LOSSES[name], ratio=ratio)
    for gap in GAPS:
        for advantage in ADVANTAGES:
            new, old = (-1.0, -1.0 - gap) if gap > 0 else (-1.0 + gap, -1.0)
            wanted, gradient = reference(config, new, old, advantage)
            if abs(wanted) > 3e38 or gradient.abs().max() > 3e38:
                continue  # an honest overflow of an advantage of 1e30
            found, by_new, stats = ours(config, new, old, advantage)
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), (gap, advantage)
            torch.testing.assert_close(by_new, gradient, rtol=1e-5, atol=1e-5)
            assert all(map(math.isfinite, stats.values())), (gap, advantage, stats)


@pytest.mark.parametrize("reject", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_rejected_token_has_no_gradient(name: str, reject: Any) -> None:
    """Whatever its ratio: the generator gave it e^50 times less, or more, than the trainer."""
    correction = ImportanceSamplingConfig(weight="token", reject=reject)
    config = ObjectiveConfig(**LOSSES[name], importance_sampling=correction)
    for gap in GAPS:
        for apart in (-50.0, 50.0, -200.0, 200.0):
            old = -1.0 - max(gap, 0.0)
            found, by_new, stats = ours(config, old + gap, old, 1.0, generator=old - apart)
            assert math.isfinite(found) and by_new.isfinite().all()
            assert by_new[1] == 0 and stats["mismatch_rejected"] == (
                3 if reject == "sequence" else 1
            )


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_importance_weights(weight: Any) -> None:
    """At ratio 1 and advantage 1 the gradient is -w."""
    correction = ImportanceSamplingConfig(weight=weight, max_weight=2.0)
    config = ObjectiveConfig(importance_sampling=correction)
    for apart in (*GAPS, math.inf):
        old, generator = (-1.0, -1.0 - apart) if apart > 0 else (-1.0 + apart, -1.0)
        _, by_new, _ = ours(config, old, old, 1.0, generator=generator)
        wanted = 2.0 if apart > math.log(2) else math.exp(apart)
        assert by_new[1].item() == pytest.approx(-wanted, rel=1e-5, abs=1e-9), apart


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(estimator: Any) -> None:
    """In the loss, with the advantage 0; k3 with d at most 20, and flat beyond."""
    config = ObjectiveConfig(kl=KLConfig(coef=1.0, estimator=estimator))
    for d in GAPS:
        new, ref = (-1.0 - d, -1.0) if d > 0 else (-1.0, -1.0 + d)
        most = min(d, 20.0)
        wanted, slope = {
            "k1": (-d, 1.0),
            "k2": (d * d / 2, -d),
            "k3": (math.expm1(most) - most, 1 - math.exp(d) if d <= 20 else 0.0),
        }[estimator]
        found, by_new, stats = ours(config, new, new, 0.0, ref=ref)
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), d
        beside = 1.0 if estimator == "k1" else 0.0  # k1's slope is 1 at the reference too
        assert by_new.tolist() == pytest.approx([beside, slope, beside], rel=1e-5, abs=1e-6), d
        assert stats["ref_kl"] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


INF = math.inf


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("new", "old", "generator", "ref"),
    [
        (-INF, -INF, -INF, -INF),
        (-INF, -1.0, -1.0, -1.0),
        (-1.0, -INF, -1.0, -INF),
        (-1.0, -1.0, -INF, -INF),
    ],
)
def test_tokens_of_probability_zero(
    new: float, old: float, generator: float, ref: float, name: str, ratio: Any
) -> None:
    """Everything is finite, and where all of them are -inf the ratio is 1 and the KL 0."""
    for estimator in ("k1", "k2", "k3"):
        for weight in ("token", "sequence"):
            config = ObjectiveConfig(
                **LOSSES[name],
                ratio=ratio,
                kl=KLConfig(coef=0.1, estimator=estimator),  # type: ignore[arg-type]
                importance_sampling=ImportanceSamplingConfig(weight=weight),  # type: ignore[arg-type]
            )
            for advantage in (-1.0, 0.0, 1.0):
                found, by_new, stats = ours(
                    config, new, old, advantage, generator=generator, ref=ref
                )
                assert math.isfinite(found) and by_new.isfinite().all()
                assert all(map(math.isfinite, stats.values()))
                if new == old == ref:
                    assert stats["ratio_mean"] == 3 and stats["ref_kl"] == stats["ppo_kl"] == 0


def test_nan_is_not_hidden() -> None:
    found, by_new, _ = ours(ObjectiveConfig(), math.nan, -1.0, 1.0)
    assert math.isnan(found) and by_new[1].isnan()
