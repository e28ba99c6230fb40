"""Generator against trainer: what is warned of, when again, and when the run stops.

Ranks are played by one process after the other; no process group is exercised.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.configs import run_config
from ragged import ragged

from sfpo_megatron.batching import BatchLayout, build_minibatches
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.run.agreement import ALLOWED, Agreement, Judgement, allowed, farthest
from sfpo_megatron.types import Minibatch, RolloutBatch

POLICY: Any = SimpleNamespace(
    layout=SimpleNamespace(tensor_rank=0),
    control=SimpleNamespace(
        all_gather_json=lambda value: [value], broadcast_json=lambda value: value
    ),
)


def planted(row: int, position: int) -> tuple[RolloutBatch, list[Minibatch]]:
    """One token of the batch is 3 nats apart, all others 0.5."""
    batch = replace(ragged(2).batch, weight_version=4)
    flat = torch.full_like(batch.generator_logprobs, -1.0)
    flat[int(batch.response_lengths[:row].sum()) + position] = 1.5
    batch = replace(batch, generator_logprobs=flat)
    layout = BatchLayout(minibatches=2, data_rank=0, data_size=1, max_tokens=40)
    minibatches = build_minibatches(batch, torch.zeros(16), layout)
    for microbatch in (m for part in minibatches for m in part.microbatches):
        microbatch.old_logprobs = torch.full_like(microbatch.generator_logprobs, -1.5)
        microbatch.old_logprobs[~microbatch.loss_mask] = 60.0
    return batch, minibatches


def test_every_token_is_found() -> None:
    lengths = ragged(2).batch.response_lengths.tolist()
    for row in (0, 2, 7, 15):
        for position in {0, lengths[row] - 1}:
            found = farthest(POLICY, *planted(row, position))
            assert found is not None and (found.row, found.position) == (row, position)
            assert (found.generator, found.trainer) == (1.5, -1.5)


@pytest.mark.parametrize("split", ["data", "context"])
def test_every_rank_hears_of_the_farthest(split: str) -> None:
    """Two ranks have parts of the rollouts, or of every sequence; two more are of another stage,
    without log-probs, and of tensor rank 1, whose log-probs are not looked at."""
    row, position = 7, 0
    batch, _ = planted(row, position)
    ranks: list[tuple[Any, list[Minibatch]]] = []
    for rank in range(2):
        layout = BatchLayout(minibatches=2, max_tokens=80, pad_multiple=8, **of_rank(split, rank))
        part = build_minibatches(batch, torch.zeros(16), layout)
        for microbatch in (m for minibatch in part for m in minibatch.microbatches):
            microbatch.old_logprobs = torch.full_like(microbatch.generator_logprobs, -1.5)
        ranks.append((0, part))
    no_logprobs = [
        replace(p, microbatches=tuple(replace(m, old_logprobs=None) for m in p.microbatches))
        for p in ranks[0][1]
    ]
    wrong = [
        replace(
            p,
            microbatches=tuple(
                replace(m, old_logprobs=torch.full_like(m.generator_logprobs, -50.0))
                for m in p.microbatches
            ),
        )
        for p in ranks[0][1]
    ]
    ranks += [(0, no_logprobs), (1, wrong)]
    said: list[Any] = []
    for everyone in (None, said):
        for tensor_rank, part in ranks:

            def gather(value: Any, answer: Any = everyone) -> Any:
                if answer is None:
                    said.append(value)
                    return [value]
                return answer

            policy: Any = SimpleNamespace(
                layout=SimpleNamespace(tensor_rank=tensor_rank),
                control=SimpleNamespace(all_gather_json=gather),
            )
            found = farthest(policy, batch, part)
            if everyone is not None:
                assert found is not None
                assert (found.row, found.position, found.generator) == (row, position, 1.5)
    assert [bool(one) for one in said] == [True, True, False, False]


def of_rank(split: str, rank: int) -> dict[str, int]:
    if split == "data":
        return {"data_rank": rank, "data_size": 2}
    return {"data_rank": 0, "data_size": 1, "context_rank": rank, "context_size": 2}


def test_a_nan_is_the_farthest() -> None:
    batch, minibatches = planted(3, 0)
    microbatch = minibatches[1].microbatches[-1]
    assert microbatch.old_logprobs is not None
    microbatch.old_logprobs[microbatch.loss_mask] = math.nan
    found = farthest(POLICY, batch, minibatches)
    assert found is not None and math.isnan(found.trainer)


def judged(agreement: Agreement, mean: float, *, step: int = 5, highest: float = 0) -> Judgement:
    batch, minibatches = planted(9, 1)
    metrics = {"logprob_diff_mean": mean, "logprob_diff_max": max(mean, highest)}
    return agreement.judge(POLICY, step, batch, minibatches, metrics)


def test_once_a_run_and_again_when_it_is_ten_times_worse() -> None:
    agreement = Agreement(run_config())
    limit, worst = allowed(run_config())
    said = [
        len(judged(agreement, mean).warnings)
        for mean in (limit / 2, 2 * limit, 3 * limit, 19 * limit, 21 * limit, 30 * limit)
    ]
    assert said == [0, 1, 0, 0, 1, 0]
    one_token = judged(Agreement(run_config()), limit / 2, highest=2 * worst)
    assert len(one_token.warnings) == 1


def test_nan_is_said_once_and_a_batch_without_trained_tokens_is_not() -> None:
    agreement = Agreement(run_config())
    assert [len(judged(agreement, math.nan).warnings) for _ in range(3)] == [1, 0, 0]
    assert judged(Agreement(stopping(0.3)), math.nan).stop is not None
    metrics = {"logprob_diff_mean": math.nan, "logprob_diff_max": 0.0}
    batch, minibatches = planted(0, 0)
    masked = [replace(part, global_valid_tokens=0) for part in minibatches]
    assert Agreement(stopping(0.3)).judge(POLICY, 5, batch, masked, metrics) == Judgement()


def test_what_is_said() -> None:
    (text,) = judged(Agreement(run_config()), 0.2).warnings
    assert "rollout 9 (prompt 2 of the batch, sample 1) at response token 1" in text
    assert "generator 1.5, trainer -1.5" in text
    for cause in ("rope", "eps", "tied", "temperature", "top_p", "quantization", "stale"):
        assert cause in text
    assert "\n" not in text


@pytest.mark.parametrize("rank", [0, 1])
def test_the_prompt_is_named_on_every_rank(rank: int) -> None:
    """Rank 0 alone has the ids, of prompts and not of rollouts; any rank's error may be printed."""
    batch, minibatches = planted(9, 1)
    heard: list[Any] = []

    def broadcast(value: Any) -> Any:
        heard.append(value)
        return "train.sums/37"

    policy: Any = SimpleNamespace(
        layout=SimpleNamespace(tensor_rank=0),
        control=SimpleNamespace(all_gather_json=lambda x: [x], broadcast_json=broadcast),
    )
    ids = ("a", "b", "train.sums/37", "d") if rank == 0 else ()
    metrics = {"logprob_diff_mean": 0.4, "logprob_diff_max": 1.0}
    found = Agreement(stopping(0.3)).judge(policy, 5, batch, minibatches, metrics, ids)
    assert heard == ["train.sums/37" if rank == 0 else None]
    assert found.stop is not None
    assert "(prompt 2 of the batch, train.sums/37, sample 1)" in found.stop


@pytest.mark.parametrize("step", [4, 6])
def test_rollouts_of_other_weights_are_not_judged(step: int) -> None:
    config = stopping(0.01)
    assert judged(Agreement(config), 9.0, step=step) == Judgement()


def stopping(most: float) -> RunConfig:
    config = run_config()
    return replace(config, train=replace(config.train, max_logprob_diff=most))


def test_it_stops_the_run_where_that_is_asked_for() -> None:
    assert judged(Agreement(stopping(0.3)), 0.2).stop is None
    stop = judged(Agreement(stopping(0.3)), 0.4).stop
    assert stop is not None and "train.max_logprob_diff is 0.3" in stop and "rollout 9" in stop


def test_what_is_allowed() -> None:
    """The lower the precision, the more; a wrong rope's 0.14 is told from float32 and bfloat16."""
    means = [mean for mean, _ in (ALLOWED[n] for n in ("float32", "float16", "bfloat16"))]
    assert means == sorted(means) and means[-1] < 0.14
    config = run_config(rollout={"top_p": 0.9})
    gain = [a - b for a, b in zip(allowed(config), allowed(run_config()), strict=True)]
    assert gain == pytest.approx([-math.log(0.9)] * 2)
