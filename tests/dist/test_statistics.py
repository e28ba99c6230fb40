"""Statistics of an objective by name: every rank gets all of them, agreed once, for two reductions.

Only ranks of the last pipeline stage call the objective, so the others learn the names here. Not
exercised: names that change between microbatches of one rank (tests/unit/test_statistics.py): it
raises on that rank alone.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import references
import torch
from harness import DP2, PP2, PP2DP2, TP1, TP2, VPP2, on_ranks
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.objective import NextTokenObjective, ObjectiveTerms, PolicyObjective

if TYPE_CHECKING:
    from workbench import Workbench

EVERY_RUN = (TP1, TP2, PP2, VPP2, DP2, PP2DP2)


def own_loss(tokens: Any, config: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO without a clip. Its statistics are known of the batch, whatever the policy."""
    losses = -tokens.ratio * tokens.advantages
    weight = config.loss_args["weight"]
    return losses, {"one": torch.ones_like(losses), "advantage": weight * tokens.advantages}


class Counted:
    """How often each of a control group's collectives was called."""

    def __init__(self, control: Any) -> None:
        self.calls = Counter[str]()
        for name in ("sum", "max", "all_gather_json"):
            setattr(control, name, partial(self._call, name, getattr(control, name)))

    def _call(self, name: str, collective: Any, *arguments: Any) -> Any:
        self.calls[name] += 1
        return collective(*arguments)


@on_ranks(*EVERY_RUN)
def test_statistics_of_a_loss_are_means_over_all_ranks(bench: Workbench) -> None:
    """Against the saved batch: a mean of ones is exactly 1, and that of the advantages is the
    token-weighted mean of the whole batch (1e-6: float32 sums). The names are gathered once."""
    objective = ObjectiveConfig(loss="test_statistics:own_loss", loss_args={"weight": 2.0})
    policy = bench.policy(objective=objective)
    minibatches = bench.prepared(policy)
    policy_objective = PolicyObjective.of(bench.config_of(policy))
    counted = Counted(policy.control)
    from sfpo_megatron.mcore.passes import run_pass

    results = [run_pass(policy, minibatches, policy_objective) for _ in range(3)]
    assert counted.calls == {"all_gather_json": 1, "sum": 3, "max": 3}
    saved = references.load_batch(bench.directory, 0)
    rewards = saved["rewards"].view(-1, references.GROUP_SIZE).double()
    centered = rewards - rewards.mean(1, keepdim=True)
    advantages = (centered / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    lengths = saved["response_lengths"].double()
    wanted = 2 * (advantages * lengths).sum().item() / lengths.sum().item()
    assert abs(wanted) > 1e-2, "the mean would not tell a missing rank"
    for result in results:
        assert result.means["one"] == 1.0
        assert result.means["advantage"] == pytest.approx(wanted, abs=1e-6)
        assert result.means.keys() == {
            *("ratio_mean", "ppo_kl", "clip_frac_low", "clip_frac_high", "one", "advantage")
        }
        assert result.maxima.keys() == {"ratio_max"} and result.maxima["ratio_max"] > 0.99
    again = policy.control.all_gather_json([[m.stats, m.maxima] for m in results[2].minibatches])
    assert all(of_rank == again[0] for of_rank in again)


@on_ranks(PP2DP2)
def test_another_objective_has_names_of_its_own(bench: Workbench) -> None:
    """None at all here: no maxima are reduced then."""
    from sfpo_megatron.mcore.passes import run_pass

    policy = bench.policy()
    minibatches = bench.prepared(policy)
    counted = Counted(policy.control)
    for objective, has in (
        (PolicyObjective.of(bench.config_of(policy)), True),
        (NextTokenObjective(), False),
    ):
        result = run_pass(policy, minibatches, objective)
        assert bool(result.means) == bool(result.maxima) == has
        assert result.minibatches[0].entropy > 0
    assert counted.calls == {"all_gather_json": 2, "sum": 2, "max": 1}


class Divided(NextTokenObjective):
    """An objective that says other things on another rank."""

    name = "here"

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Any) -> ObjectiveTerms:
        loss = torch.where(microbatch.loss_mask, -logprobs, 0.0).sum()
        return ObjectiveTerms(loss=loss, sums={self.name: loss.detach()})


@on_ranks(DP2, PP2DP2)
def test_ranks_that_name_other_statistics_all_say_so(bench: Workbench) -> None:
    from sfpo_megatron.mcore.passes import run_pass

    policy = bench.policy()
    minibatches = bench.prepared(policy)
    objective = Divided()
    Divided.name = f"on_{policy.layout.data_rank}"
    with pytest.raises(
        ValueError, match=r"found on_1, expected the names of another rank \(on_0\)"
    ):
        run_pass(policy, minibatches, objective)
