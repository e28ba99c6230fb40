"""Cut one rollout batch into minibatches of packed microbatches, the same on every rank.

A pure function of the batch: each rank computes the whole split and keeps its part, so no
communication decides it. Built once a train step; all K + 1 passes reuse it.

Which rollouts make up a minibatch is fixed (consecutive ones). Inside it they are dealt to
data-parallel ranks, and each rank's to microbatches, costliest first, each to whoever has the least
work so far. The work of a sequence of n tokens is n (1 + n / attention_break_even): its linear
layers, then causal attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.types import Microbatch, Minibatch, RolloutBatch


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchLayout:
    """What decides the split besides the batch itself."""

    minibatches: int
    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    """Context-parallel ranks share every sequence: each has two of its 2 * context_size chunks."""
    max_tokens: int
    """Token budget of a microbatch on a rank; what pads a pack to `pad_multiple` is not counted."""
    microbatch_size: int | None = None
    """Rollouts per microbatch; None packs up to max_tokens."""
    pad_multiple: int = 1
    """A rank's part of a pack is padded to a multiple of this (`pad_multiple_of`)."""
    microbatch_multiple: int = 1
    """Microbatch counts are a multiple of this (the interleaved schedule needs it)."""
    equal_lengths: bool = False
    """Pad all packs of a minibatch on a rank to one length. Pipelines need it: the stages would
    exchange lengths, which waits for the device and, interleaved, mixes up the two directions."""
    attention_break_even: float = math.inf
    """Length at which a sequence's attention costs as much as the rest of it."""

    def work(self, num_tokens: int) -> float:
        """Work of one sequence, in tokens of linear layers."""
        return num_tokens * (1 + num_tokens / self.attention_break_even)

    def span(self, num_tokens: int) -> int:
        """Tokens that a sequence takes in a pack."""
        return _round_up(num_tokens, 2 * self.context_size if self.context_size > 1 else 1)

    def total(self, spans: Iterable[int]) -> int:
        """Tokens of the pack of these sequences; an empty pack has padding alone."""
        multiple = math.lcm(self.span(1), self.context_size * self.pad_multiple)
        return _round_up(max(sum(spans), 1), multiple)


def pad_multiple_of(config: RunConfig) -> int:
    """Sequence parallelism splits a pack over tensor-parallel ranks; FP8 kernels want multiples of
    16, or of a block of 32, in each rank's part."""
    settings = config.megatron.transformer
    block = 32 if settings.get("fp8_recipe") == "mxfp8" else 16
    parts = config.parallel.tensor if config.parallel.sequence else 1
    return parts * (block if settings.get("fp8") else 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _deal(
    items: Iterable[int], work: Sequence[float], size: Sequence[int], *, bins: int, room: int
) -> list[list[int]] | None:
    """Each item, costliest first, to the bin with the least work that has room for its size; None
    if one finds no room."""
    dealt: list[list[int]] = [[] for _ in range(bins)]
    done, left = [0.0] * bins, [room] * bins
    for item in sorted(items, key=lambda i: (-work[i], i)):
        free = [b for b in range(bins) if left[b] >= size[item]]
        if not free:
            return None
        chosen = min(free, key=lambda b: (done[b], b))
        dealt[chosen].append(item)
        done[chosen] += work[item]
        left[chosen] -= size[item]
    return dealt


def _first_fit(items: Iterable[int], size: Sequence[int], *, room: int) -> list[list[int]]:
    """Largest first, each into the first bin with room: about as few bins as can be."""
    bins: list[list[int]] = []
    left: list[int] = []
    for item in sorted(items, key=lambda i: (-size[i], i)):
        chosen = next((b for b, free in enumerate(left) if free >= size[item]), len(bins))
        if chosen == len(bins):
            bins.append([])
            left.append(room)
        bins[chosen].append(item)
        left[chosen] -= size[item]
    return bins


def split(lengths: Sequence[int], layout: BatchLayout) -> list[list[list[int]]]:
    """Indices of `lengths` (one minibatch) by data-parallel rank and microbatch: each once, as many
    microbatches on every rank. A microbatch may be empty."""
    spans, share = [layout.span(length) for length in lengths], len(lengths)
    size, room = spans, layout.max_tokens * layout.context_size
    longest = max(spans, default=0)
    if layout.microbatch_size is not None:
        # Equal shares, so that no rank needs more microbatches than the others.
        size, room = [1] * len(lengths), layout.microbatch_size
        share = -(-len(lengths) // layout.data_size)
    elif longest > room:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit train.max_tokens_per_microbatch="
            f"{layout.max_tokens}; raise it to {-(-longest // layout.context_size)} or more"
        )
    work = [layout.work(length) for length in lengths]
    ranks = range(layout.data_size)
    parts = _deal(range(len(lengths)), work, [1] * len(lengths), bins=len(ranks), room=share)
    assert parts is not None
    fewest = [_first_fit(part, size, room=room) for part in parts]
    count = _round_up(max(1, *(len(bins) for bins in fewest)), layout.microbatch_multiple)
    result = []
    for part, tight in zip(parts, fewest, strict=True):
        # Where room is so tight that an even deal finds none, the fewest bins stay as they are.
        bins = _deal(part, work, size, bins=count, room=room) or tight
        result.append([sorted(bin) for bin in bins] + [[] for _ in range(count - len(bins))])
    return result


def build_minibatches(
    batch: RolloutBatch,
    advantages: Tensor,
    layout: BatchLayout,
    *,
    in_loss: Tensor | None = None,
) -> list[Minibatch]:
    """This rank's part of every minibatch.

    advantages: [N]. in_loss: [N] bool, rollouts outside it are packed and forwarded, but no loss
    mask covers them; None for all. Minibatch m takes consecutive rollouts (whole groups). All ranks
    get the same number of microbatches.
    """
    num = batch.num_rollouts
    if num % layout.minibatches:
        raise ValueError(f"{num} rollouts do not split into {layout.minibatches} minibatches")
    lengths = (batch.prompt_lengths + batch.response_lengths).tolist()
    if in_loss is None:
        in_loss = torch.ones(num, dtype=torch.bool)
    trained_lengths = batch.trained_lengths * in_loss
    rows = _Rows(batch, advantages, in_loss)
    per_minibatch = num // layout.minibatches
    result = []
    for start in range(0, num, per_minibatch):
        part = slice(start, start + per_minibatch)
        spans = [layout.span(length) for length in lengths[part]]
        ranks = split(lengths[part], layout)
        totals = [[layout.total(spans[i] for i in bin) for bin in bins] for bins in ranks]
        if layout.equal_lengths:
            totals = [[max(of_rank)] * len(of_rank) for of_rank in totals]
        mine = zip(ranks[layout.data_rank], totals[layout.data_rank], strict=True)
        result.append(
            Minibatch(
                microbatches=tuple(
                    pack_into(total, [rows[start + i] for i in bin], layout) for bin, total in mine
                ),
                global_valid_tokens=int(trained_lengths[part].sum()),
                global_num_sequences=int(trained_lengths[part].count_nonzero()),
                global_tokens=sum(lengths[part]),
                global_padded_tokens=sum(map(sum, totals)),
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
    response_mask: Tensor  # [R] bool, the tokens that the loss mask covers
    in_loss: bool = True
    """False: the loss mask covers none of them."""
    rollout: int = -1
    """Its row in the batch."""


class _Rows:
    """Random access to a flat RolloutBatch."""

    def __init__(self, batch: RolloutBatch, advantages: Tensor, in_loss: Tensor) -> None:
        lengths = batch.prompt_lengths + batch.response_lengths
        self._tokens = batch.token_ids.split(lengths.tolist())
        responses = batch.response_lengths.tolist()
        self._logprobs = batch.generator_logprobs.split(responses)
        self._masks = batch.response_mask.split(responses)
        self._prompt_lengths = batch.prompt_lengths.tolist()
        self._advantages = advantages.tolist()
        self._in_loss = in_loss.tolist()

    def __getitem__(self, index: int) -> PackRow:
        return PackRow(
            token_ids=self._tokens[index],
            prompt_length=self._prompt_lengths[index],
            advantage=self._advantages[index],
            generator_logprobs=self._logprobs[index],
            response_mask=self._masks[index],
            in_loss=self._in_loss[index],
            rollout=index,
        )


def pack(rows: Sequence[PackRow], pad_multiple: int = 1, *, at_least: int = 1) -> Microbatch:
    """One pack of its own, without context parallelism. Its length is a multiple of `pad_multiple`,
    not below `at_least`."""
    layout = BatchLayout(
        minibatches=1, data_rank=0, data_size=1, max_tokens=0, pad_multiple=pad_multiple
    )
    length = sum(row.token_ids.numel() for row in rows)
    return pack_into(layout.total([max(length, at_least)]), rows, layout)


def pack_into(total: int, rows: Sequence[PackRow], layout: BatchLayout) -> Microbatch:
    """Concatenate sequences (THD) into `total` tokens; this context-parallel rank's part of them.

    Padding, and an empty pack, is a dummy sequence of token 0 that no loss mask covers: every rank
    must run the same number of forwards.
    """
    lengths = [row.token_ids.numel() for row in rows]
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
        labels[start : end - 1] = row.token_ids[1:]
        # Position t predicts token t + 1: the response is predicted from its last prompt token on.
        response = slice(start + row.prompt_length - 1, end - 1)
        trained = row.response_mask & row.in_loss
        loss_mask[response] = trained
        advantages[response] = torch.where(trained, row.advantage, 0.0)
        generator_logprobs[response] = torch.where(row.response_mask, row.generator_logprobs, 0.0)
        ends.append(start + layout.span(length))
    if total > ends[-1]:
        ends.append(total)
    for start, end in pairwise(ends):
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


def _context_part(ends: Sequence[int], layout: BatchLayout) -> Tensor | slice:
    """Which tokens of a pack are this context-parallel rank's: of each sequence, cut into 2 * size
    chunks, chunk `rank` and its mirror image. So every rank has the same causal attention to do; it
    is the order that TransformerEngine's attention and Megatron's rotary embedding expect."""
    rank, size = layout.context_rank, layout.context_size
    if size == 1:
        return slice(None)
    parts = []
    for start, end in pairwise(ends):
        chunk = (end - start) // (2 * size)
        for place in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + place * chunk, start + (place + 1) * chunk))
    return torch.cat(parts)
