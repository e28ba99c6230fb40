"""Cut one rollout batch into minibatches of packed microbatches, the same on every rank.

A pure function of the batch: each rank computes the whole split and keeps its data-parallel part,
so no communication decides it. Built once a train step; all K + 1 passes reuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfpo_megatron.types import Microbatch, Minibatch, RolloutBatch


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchLayout:
    """What decides the split besides the batch itself."""

    minibatches: int
    data_rank: int
    data_size: int
    max_tokens: int
    """Token budget of a microbatch."""
    microbatch_size: int | None = None
    """Rollouts per microbatch; None packs up to max_tokens."""
    pad_multiple: int = 1
    """Pack lengths are padded to a multiple of this (sequence parallelism splits them)."""
    microbatch_multiple: int = 1
    """Microbatch counts are a multiple of this (the interleaved schedule needs it)."""
    equal_lengths: bool = False
    """Pad all packs of a minibatch to one length (the interleaved schedule needs it: Megatron's
    exchange of lengths mixes up the two directions between two stages)."""


def split_sizes(lengths: Sequence[int], layout: BatchLayout) -> int:
    """Microbatches that `lengths` (one rank's sequences of one minibatch) need at least."""
    if layout.microbatch_size is not None:
        return -(-len(lengths) // layout.microbatch_size)
    longest = max(lengths, default=0)
    if longest > layout.max_tokens:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit train.max_tokens_per_microbatch="
            f"{layout.max_tokens}; raise it to {longest} or more"
        )
    return len(_first_fit(lengths, layout.max_tokens))


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths`, in order, into as few consecutive bins as the budget allows."""
    bins: list[list[int]] = []
    room = -1
    for index, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = budget
        bins[-1].append(index)
        room -= length
    return bins


def _balanced(lengths: Sequence[int], num_bins: int, layout: BatchLayout) -> list[list[int]]:
    """Indices into exactly `num_bins` bins that respect the layout; a bin may be empty."""
    if layout.microbatch_size is not None:
        size = layout.microbatch_size
        bins = [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
    else:
        # Even fill: the smallest budget (by bisection) whose first fit needs no more than num_bins.
        low = max(max(lengths, default=1), -(-sum(lengths) // num_bins))
        high = layout.max_tokens
        while low < high:
            middle = (low + high) // 2
            if len(_first_fit(lengths, middle)) <= num_bins:
                high = middle
            else:
                low = middle + 1
        bins = _first_fit(lengths, high)
    return bins + [[] for _ in range(num_bins - len(bins))]


def build_minibatches(
    batch: RolloutBatch,
    advantages: Tensor,
    layout: BatchLayout,
    *,
    in_loss: Tensor | None = None,
) -> list[Minibatch]:
    """This rank's part of every minibatch.

    advantages: [N]. in_loss: [N] bool, rollouts outside it are packed and forwarded, but no loss
    mask covers them; None for all. Minibatch m takes consecutive rollouts (whole groups); inside
    it, rollout i goes to data-parallel rank i mod data_size. All ranks get the same number of
    microbatches.
    """
    num = batch.num_rollouts
    if num % (layout.minibatches * layout.data_size):
        raise ValueError(
            f"{num} rollouts do not split into {layout.minibatches} minibatches x "
            f"{layout.data_size} data-parallel ranks"
        )
    lengths = (batch.prompt_lengths + batch.response_lengths).tolist()
    if in_loss is None:
        in_loss = torch.ones(num, dtype=torch.bool)
    trained_lengths = batch.response_lengths * in_loss
    rows = _Rows(batch, advantages, in_loss)
    per_minibatch = num // layout.minibatches
    result = []
    for m in range(layout.minibatches):
        members = range(m * per_minibatch, (m + 1) * per_minibatch)
        parts = [list(members[rank :: layout.data_size]) for rank in range(layout.data_size)]
        need = max(split_sizes([lengths[i] for i in part], layout) for part in parts)
        need = -(-need // layout.microbatch_multiple) * layout.microbatch_multiple
        mine = parts[layout.data_rank]
        bins = _balanced([lengths[i] for i in mine], need, layout)
        longest = max(sum(lengths[mine[i]] for i in members_of) for members_of in bins)
        result.append(
            Minibatch(
                microbatches=tuple(
                    pack(
                        [rows[mine[i]] for i in members_of],
                        layout.pad_multiple,
                        at_least=longest if layout.equal_lengths else 1,
                    )
                    for members_of in bins
                ),
                global_valid_tokens=int(trained_lengths[members.start : members.stop].sum()),
                global_num_sequences=int(
                    trained_lengths[members.start : members.stop].count_nonzero()
                ),
                global_tokens=sum(lengths[members.start : members.stop]),
            )
        )
    return result


def set_advantages(minibatches: Sequence[Minibatch], advantages: Tensor) -> None:
    """Other advantages [N] for minibatches that are already cut."""
    for microbatch in (m for minibatch in minibatches for m in minibatch.microbatches):
        values = advantages.to(microbatch.advantages)[microbatch.rollouts.clamp(min=0)]
        on_tokens = values.repeat_interleave(microbatch.cu_seqlens.diff())
        microbatch.advantages = torch.where(microbatch.loss_mask, on_tokens, 0.0)


@dataclass(kw_only=True, frozen=True, slots=True)
class PackRow:
    """One sequence on its way into a pack."""

    token_ids: Tensor  # [P + R] int64
    prompt_length: int
    advantage: float
    generator_logprobs: Tensor  # [R] float32
    in_loss: bool = True
    """Whether the loss mask covers its response."""
    rollout: int = -1
    """Its row in the batch."""


class _Rows:
    """Random access to a flat RolloutBatch."""

    def __init__(self, batch: RolloutBatch, advantages: Tensor, in_loss: Tensor) -> None:
        lengths = batch.prompt_lengths + batch.response_lengths
        self._tokens = batch.token_ids.split(lengths.tolist())
        self._logprobs = batch.generator_logprobs.split(batch.response_lengths.tolist())
        self._prompt_lengths = batch.prompt_lengths.tolist()
        self._advantages = advantages.tolist()
        self._in_loss = in_loss.tolist()

    def __getitem__(self, index: int) -> PackRow:
        return PackRow(
            token_ids=self._tokens[index],
            prompt_length=self._prompt_lengths[index],
            advantage=self._advantages[index],
            generator_logprobs=self._logprobs[index],
            in_loss=self._in_loss[index],
            rollout=index,
        )


def pack(rows: Sequence[PackRow], pad_multiple: int = 1, *, at_least: int = 1) -> Microbatch:
    """Concatenate sequences (THD). Padding, and an empty pack, is a dummy sequence of token 0 that
    no loss mask covers: every rank must run the same number of forwards. The length is a multiple
    of `pad_multiple`, not below `at_least`."""
    lengths = [row.token_ids.numel() for row in rows]
    total = -(-max(sum(lengths), at_least) // pad_multiple) * pad_multiple
    padding = total - sum(lengths)
    token_ids = torch.zeros(total, dtype=torch.int64)
    position_ids = torch.zeros(total, dtype=torch.int64)
    labels = torch.zeros(total, dtype=torch.int64)
    loss_mask = torch.zeros(total, dtype=torch.bool)
    advantages = torch.zeros(total)
    generator_logprobs = torch.zeros(total)
    ends = [0]
    for row, length in zip(rows, lengths, strict=True):
        start, end = ends[-1], ends[-1] + length
        token_ids[start:end] = row.token_ids
        position_ids[start:end] = torch.arange(length)
        labels[start : end - 1] = row.token_ids[1:]
        # Position t predicts token t + 1: the response is predicted from its last prompt token on.
        response = slice(start + row.prompt_length - 1, end - 1)
        loss_mask[response] = row.in_loss
        advantages[response] = row.advantage if row.in_loss else 0.0
        generator_logprobs[response] = row.generator_logprobs
        ends.append(end)
    if padding:
        position_ids[ends[-1] :] = torch.arange(padding)
        ends.append(total)
    spans = [b - a for a, b in pairwise(ends)]
    rollouts = [row.rollout for row in rows] + [-1] * (len(spans) - len(rows))
    return Microbatch(
        token_ids=token_ids,
        position_ids=position_ids,
        labels=labels,
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        rollouts=torch.tensor(rollouts, dtype=torch.int64),
        max_seqlen=max(spans),
        num_tokens=sum(lengths),
        advantages=advantages,
        generator_logprobs=generator_logprobs,
    )
