"""The cut into minibatches and microbatches: every token once, within the budget, equal counts.

Property tests over ragged batches. Not exercised here: the forward passes over the packs.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made.batches import make_batch
from made.configs import run_config

from sfpo_megatron.batching import (
    BatchLayout,
    PackRow,
    build_minibatches,
    pack,
    pad_multiple_of,
)
from sfpo_megatron.types import Microbatch, RolloutBatch


def batch_of(lengths: list[tuple[int, int]], mask: list[bool] | None = None) -> RolloutBatch:
    """Token i of the batch is i + 1, its log-probs are -1, -2, -3 ...; mask: [sum R]."""
    responses = torch.tensor([r for _, r in lengths])
    return make_batch(
        torch.tensor([p for p, _ in lengths]),
        responses,
        generator_logprobs=-torch.arange(1.0, float(responses.sum()) + 1),
        response_mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
    )


def sequences(microbatch: Microbatch) -> list[slice]:
    """The real sequences of a pack (a dummy one starts with token 0)."""
    ends = microbatch.cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [span for span in spans if microbatch.token_ids[span.start] != 0]


lengths_strategy = st.tuples(st.integers(1, 9), st.integers(0, 12))


Cut: TypeAlias = tuple[list[tuple[int, int]], list[bool], BatchLayout]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Ragged lengths, empty responses and sometimes one giant sequence, any response mask; any
    layout."""
    minibatches, data = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = minibatches * draw(st.integers(1, 9))
    lengths = draw(st.lists(lengths_strategy, min_size=count, max_size=count))
    if draw(st.booleans()):
        lengths[draw(st.integers(0, count - 1))] = (5, 400)
    context = draw(st.sampled_from([1, 1, 2, 3]))
    layout = BatchLayout(
        minibatches=minibatches,
        data_rank=0,
        data_size=data,
        context_size=context,
        max_tokens=0,
        microbatch_size=draw(st.sampled_from([None, None, 1, 2])),
        pad_multiple=draw(st.sampled_from([1, 2, 4, 16])),
        microbatch_multiple=draw(st.sampled_from([1, 2])),
        equal_lengths=draw(st.booleans()),
        attention_break_even=draw(st.sampled_from([math.inf, 8.0])),
    )
    longest = -(-max(layout.span(p + r) for p, r in lengths) // context)
    # One draw for the mask: a bit a token, the same bits again and again in a giant sequence.
    bits = draw(st.integers(0, 2**64 - 1))
    mask = [bool(bits >> (i % 64) & 1) for i in range(sum(r for _, r in lengths))]
    return lengths, mask, replace(layout, max_tokens=longest + draw(st.integers(0, 30)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cuts())
def test_every_token_once_and_equal_counts(cut: Cut) -> None:
    """Over all data- and context-parallel ranks; `rollouts` leads back to the batch's order."""
    lengths, mask, layout = cut
    batch = batch_of(lengths, mask)
    trained = [int(part.sum()) for part in batch.response_mask.split([r for _, r in lengths])]
    assert batch.trained_lengths.tolist() == trained
    advantages = torch.arange(1.0, len(lengths) + 1)
    size, seen = len(lengths) // layout.minibatches, []
    for m in range(layout.minibatches):
        by_rank = [
            [
                build_minibatches(
                    batch, advantages, replace(layout, data_rank=data, context_rank=context)
                )[m]
                for context in range(layout.context_size)
            ]
            for data in range(layout.data_size)
        ]
        every = [part for ranks in by_rank for part in ranks]
        assert len({len(part.microbatches) for part in every}) == 1, "ranks would wait for ever"
        assert len(every[0].microbatches) % layout.microbatch_multiple == 0
        packs = [pack for part in every for pack in part.microbatches]
        valid = sum(int(pack.loss_mask.sum()) for pack in packs)
        assert valid == sum(trained[m * size : (m + 1) * size])
        tokens = sum(pack.token_ids.numel() for pack in packs)
        real = sum(p + r for p, r in lengths[m * size : (m + 1) * size])
        for part in every:
            assert part.global_valid_tokens == valid
            assert part.global_num_sequences == sum(n > 0 for n in trained[m * size :][:size])
            assert (part.global_tokens, part.global_padded_tokens) == (real, tokens)
        for ranks in by_rank:
            for shared in zip(*(part.microbatches for part in ranks), strict=True):
                seen.append(check_shared_pack(list(shared), layout, batch, advantages))
            for part in ranks:
                sizes = {pack.token_ids.numel() for pack in part.microbatches}
                assert len(sizes) == 1 or not layout.equal_lengths
    order = torch.cat([rollouts for rollouts, _ in seen])
    restored = torch.argsort(order)
    assert order[restored].tolist() == list(range(len(lengths)))
    sequences = [tokens for _, found in seen for tokens in found]
    assert torch.equal(torch.cat([sequences[i] for i in restored]), batch.token_ids)


def check_shared_pack(
    parts: list[Microbatch], layout: BatchLayout, batch: RolloutBatch, advantages: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One pack, of which each context-parallel rank has a part: (rollouts in it, their tokens)."""
    for part in parts:
        check_pack(part, layout)
        assert torch.equal(part.cu_seqlens, parts[0].cu_seqlens)
    rollouts = parts[0].rollouts[parts[0].rollouts >= 0]
    spans = list(itertools.pairwise(parts[0].cu_seqlens.tolist()))
    longest = max(stop - start for start, stop in spans) * len(parts)
    assert parts[0].max_seqlen == longest
    lengths = (batch.prompt_lengths + batch.response_lengths)[rollouts].tolist()
    room = [layout.span(length) for length in lengths]
    if layout.microbatch_size is None:
        assert sum(room) <= layout.max_tokens * layout.context_size
    else:
        assert len(room) <= layout.microbatch_size
    masks = batch.response_mask.split(batch.response_lengths.tolist())
    logprobs = batch.generator_logprobs.split(batch.response_lengths.tolist())
    whole = []
    for rollout, (start, stop), length in zip(rollouts.tolist(), spans, lengths, strict=False):
        positions = torch.cat([part.position_ids[start:stop] for part in parts])
        order = torch.argsort(positions)
        assert positions[order].tolist() == list(range(len(parts) * (stop - start)))
        tokens, labels, mask, credit, generated = (
            torch.cat([getattr(part, name)[start:stop] for part in parts])[order]
            for name in ("token_ids", "labels", "loss_mask", "advantages", "generator_logprobs")
        )
        assert not tokens[length:].any() and not mask[length - 1 :].any()
        prompt = int(batch.prompt_lengths[rollout])
        assert labels[mask].tolist() == tokens[prompt:length][masks[rollout]].tolist()
        assert torch.equal(generated[mask], logprobs[rollout][masks[rollout]])
        assert not generated[~mask].any()
        assert credit[mask].eq(advantages[rollout]).all() and not credit[~mask].any()
        whole.append(tokens[:length])
    return rollouts, whole


def check_pack(microbatch: Microbatch, layout: BatchLayout) -> None:
    total = microbatch.token_ids.numel()
    ends = microbatch.cu_seqlens.tolist()
    assert microbatch.cu_seqlens.dtype == torch.int32
    assert ends[0] == 0 and ends[-1] == total and sorted(set(ends)) == ends
    assert total > 0 and total % layout.pad_multiple == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(lengths_strategy, min_size=1, max_size=6),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 2**32 - 1),
)
def test_labels_mask_and_logprobs_stand_where_the_token_is_predicted(
    lengths: list[tuple[int, int]], multiple: int, bits: int
) -> None:
    batch = batch_of(lengths)
    tokens = batch.token_ids.split([p + r for p, r in lengths])
    logprobs = batch.generator_logprobs.split([r for _, r in lengths])
    rows = [
        PackRow(
            token_ids=t,
            prompt_length=p,
            advantage=float(i + 1),
            generator_logprobs=lp,
            response_mask=torch.tensor([bool(bits >> j & 1) for j in range(r)], dtype=torch.bool),
        )
        for i, (t, (p, r), lp) in enumerate(zip(tokens, lengths, logprobs, strict=True))
    ]
    packed = pack(rows, multiple)
    spans = sequences(packed)
    assert len(spans) == len(rows)
    for span, row in zip(spans, rows, strict=True):
        mask = packed.loss_mask[span]
        # The labels under the mask are the trained tokens, aligned with their log-probs.
        trained = row.token_ids[row.prompt_length :][row.response_mask]
        assert packed.labels[span][mask].tolist() == trained.tolist()
        logprobs_there = row.generator_logprobs[row.response_mask]
        assert torch.equal(packed.generator_logprobs[span][mask], logprobs_there)
        assert packed.advantages[span][mask].eq(row.advantage).all()
        assert not packed.advantages[span][~mask].any()
        assert not packed.generator_logprobs[span][~mask].any()
        assert packed.labels[span][:-1].tolist() == row.token_ids[1:].tolist()
        assert not mask[-1], "the last token predicts into the next sequence"
    covered = sum(span.stop - span.start for span in spans)
    assert not packed.loss_mask[covered:].any() and packed.token_ids[covered:].eq(0).all()


@pytest.mark.parametrize(
    ("transformer", "sequence", "multiple"),
    [
        ({}, False, 1),
        ({}, True, 2),
        ({"fp8": "hybrid"}, False, 16),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, True, 64),
    ],
)
def test_packs_are_padded_to_what_the_layout_needs(
    transformer: dict[str, Any], sequence: bool, multiple: int
) -> None:
    config = run_config(
        parallel={"tensor": 2, "sequence": sequence}, megatron={"transformer": transformer}
    )
    assert pad_multiple_of(config) == multiple


def test_an_empty_pack_is_a_dummy_sequence() -> None:
    empty = pack([], 4)
    assert empty.token_ids.tolist() == [0] * 4 and empty.cu_seqlens.tolist() == [0, 4]
    assert not empty.loss_mask.any()
    assert pack([], 4, at_least=9).token_ids.numel() == 12


def lengths_by_rank(batch: RolloutBatch, layout: BatchLayout) -> list[list[list[int]]]:
    """[rank][microbatch] -> lengths of its sequences, one minibatch."""
    found = []
    for rank in range(layout.data_size):
        (minibatch,) = build_minibatches(
            batch, torch.zeros(batch.num_rollouts), replace(layout, data_rank=rank)
        )
        found.append(
            [[s.stop - s.start for s in sequences(pack)] for pack in minibatch.microbatches]
        )
    return found


def test_packs_are_filled_evenly() -> None:
    """9 sequences of 10 tokens under a budget of 40: 3 packs of 30, not 40 + 40 + 10."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=40)
    assert lengths_by_rank(batch_of([(5, 5)] * 9), layout) == [[[10] * 3] * 3]


@pytest.mark.parametrize("of", ["ranks", "packs"])
def test_dealt_are_equal_parts_of_work_not_of_tokens(of: str) -> None:
    """One sequence of 400 tokens and 20 of 40; attention costs as much as the rest at 400. The long
    one is worth 800 tokens and a short one 44, so it goes with 1 of them, not with 5."""
    batch = batch_of([(10, 390)] + [(10, 30)] * 20)
    size, room = {"ranks": (2, 1200), "packs": (1, 800)}[of]
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=size, max_tokens=room)
    parts = {}
    for break_even in (400.0, math.inf):
        dealt = lengths_by_rank(batch, replace(layout, attention_break_even=break_even))
        two = [rank[0] for rank in dealt] if of == "ranks" else dealt[0]
        parts[break_even] = sorted(len(part) for part in two)
    assert parts == {400.0: [2, 19], math.inf: [6, 15]}


def test_heavy_tailed_lengths_are_dealt_evenly() -> None:
    """No rank has 1% more work than the mean, no pack 10%."""
    random = torch.Generator().manual_seed(0)
    tail = torch.rand(128, generator=random).pow(-0.7).mul(40).clamp(max=500).long().tolist()
    layout = BatchLayout(
        minibatches=1, data_rank=0, data_size=4, max_tokens=1024, attention_break_even=1000.0
    )
    dealt = lengths_by_rank(batch_of([(10, n) for n in tail]), layout)
    packs = torch.tensor([[sum(map(layout.work, pack)) for pack in rank] for rank in dealt])
    ranks = packs.sum(dim=1)
    assert ranks.max() < 1.01 * ranks.mean() and packs.max() < 1.1 * packs.mean()


def test_a_deal_that_finds_no_room_keeps_the_fewest_packs() -> None:
    """6 6 4 4 4 under 12: two packs hold them only as 6 6 and 4 4 4, which is no even deal."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=12)
    batch = batch_of([(3, 3), (2, 2), (3, 3), (2, 2), (2, 2)])
    assert lengths_by_rank(batch, layout) == [[[6, 6], [4, 4, 4]]]


def test_fewer_rollouts_than_ranks() -> None:
    """A rank without any runs as many dummy packs."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=3, max_tokens=10)
    assert lengths_by_rank(batch_of([(5, 5), (1, 1)]), layout) == [[[10]], [[2]], [[]]]


def test_only_empty_responses() -> None:
    """No token is trained on; the counts say so."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=10)
    (minibatch,) = build_minibatches(batch_of([(5, 0), (3, 0)]), torch.ones(2), layout)
    assert (minibatch.global_valid_tokens, minibatch.global_num_sequences) == (0, 0)
    assert not any(pack.loss_mask.any() for pack in minibatch.microbatches)


def test_context_ranks_share_causal_attention_evenly() -> None:
    """Each has chunk r of each sequence and its mirror image, as TransformerEngine expects: the
    pairs of a query and a key are as many on every rank."""
    layout = BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=12, context_size=3)
    for rank, mine in enumerate([[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]):
        (minibatch,) = build_minibatches(
            batch_of([(7, 5), (5, 7)]), torch.zeros(2), replace(layout, context_rank=rank)
        )
        (pack,) = minibatch.microbatches
        assert pack.position_ids.tolist() == mine * 2
        assert (pack.cu_seqlens.tolist(), pack.max_seqlen) == ([0, 4, 8], 12)


@pytest.mark.parametrize(("context", "least"), [(1, 10), (2, 6)])
def test_a_sequence_over_the_budget_is_refused_with_both_numbers(context: int, least: int) -> None:
    """Two context-parallel ranks share 10 tokens as 12: in 4 chunks of 3."""
    layout = BatchLayout(
        minibatches=1, data_rank=0, data_size=1, max_tokens=5, context_size=context
    )
    with pytest.raises(ValueError, match=rf"tokens .*per_microbatch=5; raise it to {least}"):
        build_minibatches(batch_of([(5, 5)]), torch.zeros(1), layout)
    build_minibatches(batch_of([(5, 5)]), torch.zeros(1), replace(layout, max_tokens=least))


def test_a_batch_that_does_not_split_is_refused() -> None:
    layout = BatchLayout(minibatches=2, data_rank=0, data_size=2, max_tokens=9)
    with pytest.raises(ValueError, match="5 rollouts do not split into 2 minibatches"):
        build_minibatches(batch_of([(1, 1)] * 5), torch.zeros(5), layout)
