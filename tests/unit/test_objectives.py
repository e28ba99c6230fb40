"""The statistics of the policy objective, its first pass, and the next-token objective.

Not exercised here: the reduction over ranks (tests/dist); values and gradients of the losses are in
test_objectives_losses.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ragged import cut, objective_of, ragged, run

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.objective import NextTokenObjective


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.3},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"dual_clip": 1.5},
        {"loss": "cispo"},
        {"loss": "no_clip"},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    ],
    ids=str,
)
def test_statistics_against_a_loop_over_tokens(settings: dict[str, Any], seed: int) -> None:
    data, config = ragged(seed), ObjectiveConfig(**settings)
    clip = ("clip_frac_low", "clip_frac_high")
    wanted = dict.fromkeys(("ratio_mean", "ppo_kl", *clip, "ratio_max"), 0.0)
    for index, span in data.responses():
        gaps = (data.new[span] - data.old[span]).tolist()
        advantage = float(data.advantages[index])
        for gap in gaps:
            ratio = math.exp(sum(gaps) / len(gaps) if config.ratio == "sequence" else gap)
            low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
            if config.loss == "ppo_clip":  # only where the clip takes the gradient
                low, high = low and advantage < 0, high and advantage > 0
                if config.dual_clip is not None and advantage < 0:
                    high = ratio > config.dual_clip
            elif config.loss == "no_clip":
                low = high = False
            wanted["ratio_mean"] += ratio
            wanted["ppo_kl"] -= gap
            wanted["ratio_max"] = max(wanted["ratio_max"], ratio)
            wanted["clip_frac_low"] += low
            wanted["clip_frac_high"] += high
    _, found = run(data, config)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    if config.loss != "no_clip":
        assert all(0 < found[name] < data.batch.response_lengths.sum() for name in clip)


def test_first_pass_has_ratio_one_and_the_policy_gradient() -> None:
    data = ragged(1, spread=0.0)
    loss, found = run(data, ObjectiveConfig())
    count = int(data.batch.response_lengths.sum())
    assert found.pop("ratio_mean") == count and found.pop("ratio_max") == 1
    assert not any(found.values())
    loss.backward()
    assert data.new.grad is not None
    for index, span in data.responses():
        wanted = (-data.advantages[index] / count).expand(data.new.grad[span].shape)
        torch.testing.assert_close(data.new.grad[span], wanted)


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_entropy_gradient_is_asked_for_only_with_a_bonus(coef: float) -> None:
    assert objective_of(ObjectiveConfig(entropy_coef=coef)).with_entropy_grad == (coef > 0)


def test_next_token_objective_is_the_negative_log_likelihood() -> None:
    data = ragged(3)
    objective, total = NextTokenObjective(), torch.zeros(())
    for microbatch in (m for part in cut(data, ObjectiveConfig()) for m in part.microbatches):
        labels = microbatch.labels
        terms = objective(data.new[labels], data.entropy[labels], microbatch)
        total = total + terms.loss
        assert terms.sums == terms.maxima == {}
    spans = [span for _, span in data.responses()]
    wanted = -sum(data.new.detach().double()[span].sum().item() for span in spans)
    assert total.item() == pytest.approx(wanted)
    total.backward()
    assert data.new.grad is not None
    assert all(data.new.grad[span].eq(-1).all() for span in spans)
    assert data.new.grad.sum() == -data.batch.response_lengths.sum()
