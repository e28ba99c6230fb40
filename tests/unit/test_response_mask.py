"""The response mask: what is trained on is exactly it; all True, packs are what they were.

The reference of the loss knows no packs: float64, rollout by rollout, over the tokens under the
mask alone. Ours is float32 over packs; bounds as in test_objectives_losses.py. What no mask covers
holds log-probs of 60, NaN from the generator. Not exercised here: a model, and the reduction over
real ranks (tests/dist/test_invariance.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made.batches import make_batch, with_random_mask
from ragged import MAX_RESPONSE, Ragged, objective_of, ragged
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfpo_megatron.batching import (
    BatchLayout,
    PackRow,
    _context_part,
    build_minibatches,
    pack_into,
    set_advantages,
)
from sfpo_megatron.config.objective import (
    ImportanceSamplingConfig,
    KLConfig,
    ObjectiveConfig,
    OverlongConfig,
)
from sfpo_megatron.objectives.advantage import soft_overlong_penalty
from sfpo_megatron.run.metrics import Totals, batch_metrics, logprob_difference
from sfpo_megatron.run.saved_rollouts import RolloutSaver, SavedFeed
from sfpo_megatron.types import Microbatch, Rollout, RolloutBatch

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")


# ---- the loss, against float64 -------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> tuple[Ragged, BatchLayout]:
    """A batch with any mask (rollouts without a trained token among them), and any split of it."""
    data = ragged(draw(st.integers(0, 5)))
    bits = draw(st.lists(st.booleans(), min_size=8, max_size=64))
    num = data.batch.response_mask.numel()
    mask = torch.tensor([bits[i % len(bits)] for i in range(num)])
    if draw(st.booleans()):  # a rollout without any, one with its last token alone
        mask = mask & with_random_mask(data.batch, 0, share=1.0).response_mask
    generated = torch.where(mask, data.batch.generator_logprobs, torch.nan)
    data.batch = replace(data.batch, response_mask=mask, generator_logprobs=generated)
    in_mask = torch.zeros(data.new.shape, dtype=torch.bool)
    for _, at in trained(data):
        in_mask[at] = True
    data.new.detach()[~in_mask] = 60.0
    layout = BatchLayout(
        minibatches=draw(st.sampled_from([1, 2, 4])),
        data_rank=0,
        data_size=draw(st.sampled_from([1, 2, 3])),
        context_size=draw(st.sampled_from([1, 1, 2])),
        max_tokens=draw(st.sampled_from([20, 40, 400])),
        microbatch_size=draw(st.sampled_from([None, 1, 3])),
        pad_multiple=draw(st.sampled_from([1, 8])),
    )
    return data, layout


def trained(data: Ragged) -> list[tuple[int, Tensor]]:
    """(rollout, where in the flat tensors its trained tokens are)."""
    parts = data.batch.response_mask.split(data.batch.response_lengths.tolist())
    return [
        (index, torch.arange(span.start, span.stop)[part])
        for (index, span), part in zip(data.responses(), parts, strict=True)
    ]


def reference(
    data: Ragged, rollouts: range, ref: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss of the minibatch of these rollouts, by the leaves) float64: log-probs and entropies."""
    new = data.new.detach().double().requires_grad_()
    entropy = data.entropy.detach().double().requires_grad_()
    generated = torch.zeros(new.shape, dtype=torch.float64)
    spans = [torch.arange(span.start, span.stop) for _, span in data.responses()]
    generated[torch.cat(spans)] = data.batch.generator_logprobs.double()
    per_rollout = []
    for index, at in trained(data):
        if index not in rollouts or not at.numel():
            continue
        advantage, gap = data.advantages[index].double(), new[at] - data.old[at].double()
        if config.ratio == "sequence":
            gap = gap.mean().expand(gap.shape)
        ratio = gap.exp()
        loss = -torch.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
        mismatch = data.old[at].double() - generated[at]
        if config.importance_sampling.weight == "token":
            loss = loss * mismatch.exp().clip(max=2.0)
        elif config.importance_sampling.weight == "sequence":
            loss = loss * mismatch.sum().exp().clip(max=2.0)
        d = ref[at].double() - new[at]
        loss = loss + config.kl.coef * (d.exp() - 1 - d) - config.entropy_coef * entropy[at]
        per_rollout.append(loss)
    if not per_rollout:
        nothing = (new.sum() + entropy.sum()) * 0
        return nothing, new, entropy
    if config.aggregation == "token_mean":
        return torch.cat(per_rollout).mean(), new, entropy
    if config.aggregation == "seq_mean_token_mean":
        return torch.stack([loss.mean() for loss in per_rollout]).mean(), new, entropy
    constant = MAX_RESPONSE if config.aggregation == "token_sum_norm" else 1
    return torch.stack([loss.sum() for loss in per_rollout]).mean() / constant, new, entropy


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=masks())
def test_loss_and_gradient_of_every_split(
    ratio: Any, aggregation: Any, case: tuple[Ragged, BatchLayout]
) -> None:
    data, layout = case
    if "sequence" in ratio or aggregation == "seq_mean_token_mean":
        layout = replace(layout, context_size=1)  # config/rules/context_parallel.py refuses it
    config = ObjectiveConfig(
        ratio=ratio,
        aggregation=aggregation,
        entropy_coef=0.05,
        kl=KLConfig(coef=0.1),
        importance_sampling=ImportanceSamplingConfig(weight=ratio),
    )
    random = torch.Generator().manual_seed(5)
    ref = data.old + 0.3 * torch.randn(data.old.shape, generator=random)
    objective, size = objective_of(config), data.batch.num_rollouts // layout.minibatches
    ranks = itertools.product(range(layout.data_size), range(layout.context_size))
    by_rank = [
        build_minibatches(
            data.batch,
            data.advantages,
            replace(layout, data_rank=data_rank, context_rank=context),
        )
        for data_rank, context in ranks
    ]
    for m, parts in enumerate(zip(*by_rank, strict=True)):
        ours = torch.zeros(())
        for microbatch in (pack for part in parts for pack in part.microbatches):
            labels = microbatch.labels
            microbatch.old_logprobs, microbatch.ref_logprobs = data.old[labels], ref[labels]
            ours = ours + objective(data.new[labels], data.entropy[labels], microbatch).loss
        (normalizer,) = {objective.normalizer(part) for part in parts}
        ours = ours / max(normalizer, 1)
        wanted, *leaves = reference(data, range(m * size, (m + 1) * size), ref, config)
        assert ours.item() == pytest.approx(wanted.item(), rel=2e-5, abs=2e-6)
        found = torch.autograd.grad(ours, [data.new, data.entropy])
        for got, exact in zip(found, torch.autograd.grad(wanted, leaves), strict=True):
            scale = max(exact.abs().max().item(), 1e-3)
            torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-6 * scale)


def test_advantages_set_later_stand_under_the_mask_alone() -> None:
    batch = with_random_mask(ragged(1).batch, 1)
    layout = BatchLayout(minibatches=2, data_rank=0, data_size=1, max_tokens=40, pad_multiple=8)
    values = torch.arange(1.0, 17.0)
    wanted = build_minibatches(batch, values, layout)
    found = build_minibatches(batch, torch.zeros(16), layout)
    set_advantages(found, values)
    for one, other in zip(wanted, found, strict=True):
        for a, b in zip(one.microbatches, other.microbatches, strict=True):
            assert torch.equal(a.advantages, b.advantages)
            assert torch.equal(b.advantages != 0, b.loss_mask)


# ---- all of it trained on: what packs were before there was a mask -------------------------------


def packed_before(total: int, rows: Sequence[PackRow], layout: BatchLayout) -> Microbatch:
    """`batching.pack_into` of the commit before rows had a response_mask."""
    lengths = [row.token_ids.numel() for row in rows]
    token_ids, position_ids, labels = (torch.zeros(total, dtype=torch.int64) for _ in range(3))
    loss_mask = torch.zeros(total, dtype=torch.bool)
    advantages, generator_logprobs = torch.zeros(total), torch.zeros(total)
    ends = [0]
    for row, length in zip(rows, lengths, strict=True):
        start, end = ends[-1], ends[-1] + length
        token_ids[start:end] = row.token_ids
        labels[start : end - 1] = row.token_ids[1:]
        response = slice(start + row.prompt_length - 1, end - 1)
        loss_mask[response] = row.in_loss
        advantages[response] = row.advantage if row.in_loss else 0.0
        generator_logprobs[response] = row.generator_logprobs
        ends.append(start + layout.span(length))
    if total > ends[-1]:
        ends.append(total)
    for start, end in itertools.pairwise(ends):
        position_ids[start:end] = torch.arange(end - start)
    mine = _context_part(ends, layout)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    rollouts = [row.rollout for row in rows] + [-1] * (len(ends) - 1 - len(rows))
    return Microbatch(
        token_ids=token_ids[mine],
        position_ids=position_ids[mine],
        labels=labels[mine],
        loss_mask=loss_mask[mine],
        cu_seqlens=cu_seqlens // layout.context_size,
        rollouts=torch.tensor(rollouts, dtype=torch.int64),
        max_seqlen=int(cu_seqlens.diff().max()),
        num_tokens=sum(map(layout.span, lengths)) // layout.context_size,
        advantages=advantages[mine],
        generator_logprobs=generator_logprobs[mine],
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 12), st.floats(-3, 3), st.booleans()),
        max_size=6,
    ),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 4]),
)
def test_packs_are_bit_for_bit_what_they_were(
    sequences: list[tuple[int, int, float, bool]], context: int, multiple: int
) -> None:
    layout = BatchLayout(
        minibatches=1, data_rank=0, data_size=1, max_tokens=0,
        context_rank=context - 1, context_size=context, pad_multiple=multiple,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    rows = [
        PackRow(
            token_ids=torch.randint(1, 99, (prompt + response,), generator=random),
            prompt_length=prompt,
            advantage=advantage,
            generator_logprobs=-torch.rand(response, generator=random),
            response_mask=torch.ones(response, dtype=torch.bool),
            in_loss=in_loss,
            rollout=index,
        )
        for index, (prompt, response, advantage, in_loss) in enumerate(sequences)
    ]
    total = layout.total(layout.span(row.token_ids.numel()) for row in rows)
    ours, before = pack_into(total, rows, layout), packed_before(total, rows, layout)
    for name in (field.name for field in fields(Microbatch)):
        one, other = getattr(ours, name), getattr(before, name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        else:
            assert one == other, name


# ---- what is counted -----------------------------------------------------------------------------


def test_lengths_count_trained_tokens_and_the_penalty_counts_all() -> None:
    """A response of 10 tokens of which 4 are the model's fills the room of 10."""
    mask = torch.tensor([True] * 3 + [False] * 6 + [True] + [True] * 2)
    batch = make_batch(torch.tensor([2, 2]), torch.tensor([10, 2]), response_mask=mask)
    assert batch_metrics(batch, Totals())["response_tokens_mean"] == (4 + 2) / 2
    config = ObjectiveConfig(overlong=OverlongConfig(buffer_tokens=4))
    penalty = soft_overlong_penalty(batch.response_lengths, 10, config)
    assert penalty.tolist() == [-1.0, 0.0]


def test_log_probs_are_compared_under_the_mask_alone() -> None:
    """On one rank, which has everything; the trainer's are lower by 0.5 and 1.0 in turns."""
    batch = with_random_mask(ragged(2).batch, 2)
    batch = replace(
        batch, generator_logprobs=torch.where(batch.response_mask, batch.generator_logprobs, -99.0)
    )
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=40)
    minibatches = build_minibatches(batch, torch.zeros(16), layout)
    lower = []
    for microbatch in minibatches[0].microbatches:
        by = torch.where(torch.arange(microbatch.labels.numel()) % 2 == 0, 0.5, 1.0)
        microbatch.old_logprobs = microbatch.generator_logprobs - by
        microbatch.old_logprobs[~microbatch.loss_mask] = 60.0
        lower += by[microbatch.loss_mask].tolist()
    same = SimpleNamespace(sum=lambda tensor: tensor, max=lambda tensor: tensor)
    policy: Any = SimpleNamespace(layout=SimpleNamespace(tensor_rank=0), control=same)
    found = logprob_difference(policy, minibatches)
    assert len(lower) == int(batch.response_mask.sum()) and len(set(lower)) == 2
    assert found["logprob_diff_mean"] == pytest.approx(sum(lower) / len(lower), abs=1e-6)
    assert found["generator_kl"] == pytest.approx(sum(lower) / len(lower), abs=1e-6)
    assert found["logprob_diff_max"] == pytest.approx(1.0, abs=1e-6)


# ---- batches -------------------------------------------------------------------------------------


def rollout(**changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "prompt_id": "p/0", "sample": 1, "prompt_token_ids": (7,), "token_ids": (1, 2, 3),
        "generator_logprobs": (-1.0, 0.0, -2.0), "response_mask": (True, False, True),
        "finished": True, "text": "", "reward": 1.0, "correct": True, "weight_version": 0,
    }  # fmt: skip
    return Rollout(**(values | changes))


def test_rollouts_bring_their_masks() -> None:
    empty = rollout(token_ids=(), generator_logprobs=(), response_mask=())
    batch = RolloutBatch.from_rollouts([rollout(), empty, rollout()], 1)
    assert batch.response_mask.tolist() == [True, False, True] * 2
    assert batch.trained_lengths.tolist() == [2, 0, 2]
    assert RolloutBatch.from_rollouts([empty], 1).response_mask.dtype == torch.bool


def test_lengths_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout 1 of prompt p/0: found 3 token_ids, 3 .* 2 res"):
        RolloutBatch.from_rollouts([rollout(response_mask=(True, True))], 1)
    batch = RolloutBatch.from_rollouts([rollout()], 1)
    with pytest.raises(ValueError, match=r"found response_mask of shape \(2,\), expected \(3,\)"):
        replace(batch, response_mask=batch.response_mask[:2])
    with pytest.raises(ValueError, match=r"found torch.float32, expected torch.bool"):
        replace(batch, response_mask=batch.response_mask.float())
    with pytest.raises(ValueError, match=r"found rewards of shape \(2,\), expected \(1,\)"):
        replace(batch, rewards=torch.zeros(2))


def test_saved_before_there_were_masks_is_all_trained_on(tmp_path: Path) -> None:
    """A file of `debug.save_rollouts`; what else it lacks is an error still."""
    batch, file = RolloutBatch.from_rollouts([rollout()], 1), tmp_path / "rollouts.safetensors"
    RolloutSaver(str(file)).add(1, batch)
    assert SavedFeed(str(file)).collect(1, refit).response_mask.tolist() == [True, False, True]
    tensors = load_file(file)
    del tensors["1.response_mask"]
    save_file(tensors, file)
    assert SavedFeed(str(file)).collect(1, refit).response_mask.tolist() == [True] * 3
    del tensors["1.finished"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"found no finished for train step 1 .* again"):
        SavedFeed(str(file)).collect(1, refit)


def refit() -> None:
    raise AssertionError("there is no engine")
