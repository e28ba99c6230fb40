"""The cut into minibatches and microbatches: every token once, within the budget, equal counts.

Property tests over ragged batches. Not exercised here: the forward passes over the packs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpo_megatron.batching import BatchLayout, PackRow, build_minibatches, pack
from sfpo_megatron.types import Microbatch, RolloutBatch


def make_batch(lengths: list[tuple[int, int]]) -> RolloutBatch:
    """Token i of the batch is i + 1 (so that each is told apart and 0 is padding)."""
    prompts = torch.tensor([p for p, _ in lengths])
    responses = torch.tensor([r for _, r in lengths])
    return RolloutBatch(
        group_size=1,
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=torch.arange(1, int((prompts + responses).sum()) + 1),
        generator_logprobs=-torch.arange(1.0, float(responses.sum()) + 1),
        rewards=torch.zeros(len(lengths)),
        correct=torch.zeros(len(lengths), dtype=torch.bool),
        finished=torch.ones(len(lengths), dtype=torch.bool),
        weight_version=0,
    )


def sequences(microbatch: Microbatch) -> list[slice]:
    """The real sequences of a pack (a dummy one starts with token 0)."""
    ends = microbatch.cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [span for span in spans if microbatch.token_ids[span.start] != 0]


lengths_strategy = st.tuples(st.integers(1, 9), st.integers(0, 12))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], BatchLayout]:
    minibatches, data = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = minibatches * data * draw(st.integers(1, 4))
    lengths = draw(st.lists(lengths_strategy, min_size=count, max_size=count))
    longest = max(p + r for p, r in lengths)
    layout = BatchLayout(
        minibatches=minibatches,
        data_rank=0,
        data_size=data,
        max_tokens=longest + draw(st.integers(0, 30)),
        microbatch_size=draw(st.sampled_from([None, None, 1, 2])),
        pad_multiple=draw(st.sampled_from([1, 2, 4])),
        microbatch_multiple=draw(st.sampled_from([1, 2])),
        equal_lengths=draw(st.booleans()),
    )
    return lengths, layout


def rank_of(layout: BatchLayout, rank: int) -> BatchLayout:
    fields = {name: getattr(layout, name) for name in BatchLayout.__slots__}
    return BatchLayout(**{**fields, "data_rank": rank})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cuts())
def test_every_token_once_and_equal_counts(cut: tuple[list[tuple[int, int]], BatchLayout]) -> None:
    lengths, layout = cut
    batch = make_batch(lengths)
    advantages = torch.arange(1.0, len(lengths) + 1)
    ranks = [
        build_minibatches(batch, advantages, rank_of(layout, rank))
        for rank in range(layout.data_size)
    ]
    seen: list[int] = []
    for m in range(layout.minibatches):
        parts = [rank[m] for rank in ranks]
        assert len({len(part.microbatches) for part in parts}) == 1, "ranks would wait for ever"
        assert len(parts[0].microbatches) % layout.microbatch_multiple == 0
        valid = sum(int(b.loss_mask.sum()) for part in parts for b in part.microbatches)
        assert {part.global_valid_tokens for part in parts} == {valid}
        size = len(lengths) // layout.minibatches
        assert valid == sum(r for _, r in lengths[m * size : (m + 1) * size])
        for part in parts:
            if layout.equal_lengths:
                assert len({b.token_ids.numel() for b in part.microbatches}) == 1
            for microbatch in part.microbatches:
                check_pack(microbatch, layout)
                seen += microbatch.token_ids[microbatch.token_ids != 0].tolist()
    assert sorted(seen) == batch.token_ids.tolist()


def check_pack(microbatch: Microbatch, layout: BatchLayout) -> None:
    total = microbatch.token_ids.numel()
    ends = microbatch.cu_seqlens.tolist()
    assert microbatch.cu_seqlens.dtype == torch.int32
    assert ends[0] == 0 and ends[-1] == total and sorted(set(ends)) == ends
    assert microbatch.max_seqlen == max(b - a for a, b in itertools.pairwise(ends))
    assert total > 0 and total % layout.pad_multiple == 0
    real = sequences(microbatch)
    if layout.microbatch_size is None:
        assert sum(span.stop - span.start for span in real) <= layout.max_tokens
    else:
        assert len(real) <= layout.microbatch_size
    for start, stop in itertools.pairwise(ends):
        assert microbatch.position_ids[start:stop].tolist() == list(range(stop - start))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(lengths_strategy, min_size=1, max_size=6), st.sampled_from([1, 2, 8]))
def test_labels_mask_and_logprobs_stand_where_the_token_is_predicted(
    lengths: list[tuple[int, int]], multiple: int
) -> None:
    batch = make_batch(lengths)
    tokens = batch.token_ids.split([p + r for p, r in lengths])
    logprobs = batch.generator_logprobs.split([r for _, r in lengths])
    rows = [
        PackRow(token_ids=t, prompt_length=p, advantage=float(i + 1), generator_logprobs=lp)
        for i, (t, (p, _), lp) in enumerate(zip(tokens, lengths, logprobs, strict=True))
    ]
    packed = pack(rows, multiple)
    spans = sequences(packed)
    assert len(spans) == len(rows)
    for span, row in zip(spans, rows, strict=True):
        mask = packed.loss_mask[span]
        # The labels under the mask are the response; it is aligned with its log-probs.
        assert packed.labels[span][mask].tolist() == row.token_ids[row.prompt_length :].tolist()
        assert torch.equal(packed.generator_logprobs[span][mask], row.generator_logprobs)
        assert packed.advantages[span][mask].eq(row.advantage).all()
        assert not packed.advantages[span][~mask].any()
        assert not packed.generator_logprobs[span][~mask].any()
        assert packed.labels[span][:-1].tolist() == row.token_ids[1:].tolist()
        assert not mask[-1], "the last token predicts into the next sequence"
    covered = sum(span.stop - span.start for span in spans)
    assert not packed.loss_mask[covered:].any() and packed.token_ids[covered:].eq(0).all()


def test_an_empty_pack_is_a_dummy_sequence() -> None:
    empty = pack([], 4)
    assert empty.token_ids.tolist() == [0] * 4 and empty.cu_seqlens.tolist() == [0, 4]
    assert not empty.loss_mask.any()
    assert pack([], 4, at_least=9).token_ids.numel() == 12


def test_ranks_take_turns_inside_consecutive_minibatches() -> None:
    """Rollout i of a minibatch goes to rank i mod data_size, so that groups are spread."""
    batch = make_batch([(1, 1)] * 8)
    advantages = torch.arange(8.0)

    def owned(rank: int) -> list[list[float]]:
        layout = BatchLayout(minibatches=2, data_rank=rank, data_size=2, max_tokens=100)
        return [
            [a for b in m.microbatches for a in b.advantages[b.loss_mask].tolist()]
            for m in build_minibatches(batch, advantages, layout)
        ]

    assert owned(0) == [[0.0, 2.0], [4.0, 6.0]] and owned(1) == [[1.0, 3.0], [5.0, 7.0]]


def test_packs_are_filled_evenly() -> None:
    """9 sequences of 10 tokens under a budget of 40: 3 packs of 30, not 40 + 40 + 10."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=40)
    (minibatch,) = build_minibatches(make_batch([(5, 5)] * 9), torch.zeros(9), layout)
    assert [b.token_ids.numel() for b in minibatch.microbatches] == [30, 30, 30]


def test_a_sequence_over_the_budget_is_refused_with_both_numbers() -> None:
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=9)
    with pytest.raises(ValueError, match=r"10 tokens .*per_microbatch=9; raise it to 10"):
        build_minibatches(make_batch([(5, 5)]), torch.zeros(1), layout)


def test_a_batch_that_does_not_split_is_refused() -> None:
    layout = BatchLayout(minibatches=2, data_rank=0, data_size=2, max_tokens=9)
    with pytest.raises(ValueError, match="6 rollouts do not split into 2 minibatches x 2"):
        build_minibatches(make_batch([(1, 1)] * 6), torch.zeros(6), layout)
