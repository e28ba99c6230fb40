"""Who sends which part of which tensor: integers only, made once a run, the same on every rank.

Every Megatron shard is cut into *pieces*: rectangles of full Hugging Face tensors. Each piece is
taken from one of the ranks that hold it (data- and context-parallel copies share the work), so all
of a model's bytes leave the trainer once. Execution is in `source.py` and the transports.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfpo_megatron.families.operations import dtype_of
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import hf_shapes


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """Part of one Hugging Face tensor that one tensor-parallel rank's shard holds.

    Rows of the target from `start` on along `dim`. In the shard they are the rows
    [source_start, source_stop) of each of `groups` equal blocks (qkv is laid out by kv group,
    gate-up by halves), one block after another.
    """

    part: int
    """Index in `rule.hf`."""
    dim: int
    start: int
    stop: int
    groups: int
    source_start: int
    source_stop: int


def pieces_of(rule: Rule, shape: ModelShape, *, rank: int, size: int) -> list[Piece]:
    """All pieces of tensor-parallel rank `rank`'s shard; none where another rank has the same."""
    if rule.tp_dim is None or size == 1:
        if rank > 0 and rule.tp_dim is None:
            return []
        rank, size = 0, 1
    parts = hf_shapes(rule, shape)
    if rule.kind == "vocab":
        rows = shape.padded_vocab_size(size) // size
        stop = min(shape.vocab_size, (rank + 1) * rows)
        return [_piece(0, 0, rank * rows, stop, 1, 0)] if stop > rank * rows else []
    dim = rule.tp_dim or 0
    if rule.kind == "qkv":
        rows_of = [full[0] for full in parts]
        if shape.num_kv_heads % size:
            return _pieces_of_a_group(rows_of, shape.num_kv_heads, rank, size)
        groups = shape.num_kv_heads // size
        found, at = [], 0
        for part, rows in enumerate(rows // size for rows in rows_of):
            found.append(_piece(part, 0, rank * rows, (rank + 1) * rows, groups, at))
            at += rows // groups
        return found
    if rule.kind == "gate_up":
        rows = parts[0][0] // size
        return [
            _piece(part, 0, rank * rows, (rank + 1) * rows, 1, part * rows) for part in range(2)
        ]
    rows = parts[0][dim] // size
    return [_piece(0, dim, rank * rows, (rank + 1) * rows, 1, 0)]


def _piece(part: int, dim: int, start: int, stop: int, groups: int, source_start: int) -> Piece:
    return Piece(
        part=part,
        dim=dim,
        start=start,
        stop=stop,
        groups=groups,
        source_start=source_start,
        source_stop=source_start + (stop - start) // groups,
    )


def _pieces_of_a_group(rows_of: Sequence[int], groups: int, rank: int, size: int) -> list[Piece]:
    """A rank's equal share of the rows [q, k, v] of one kv group, where several ranks share each;
    Megatron gathers the rows in each forward (SelfAttention.get_query_key_value_tensors).

    rows_of: of all groups, for each of q, k and v.
    """
    if size % groups or sum(rows_of) % size:
        raise ValueError(
            f"parallel.tensor: found {size}, expected a divisor or a multiple of the model's "
            f"num_key_value_heads ({groups}), and a divisor of {sum(rows_of)} rows of q, k and v"
        )
    group, share = divmod(rank, size // groups)
    length = sum(rows_of) // size
    first = share * length  # in the group's rows
    found, at = [], 0
    for part, rows in enumerate(rows // groups for rows in rows_of):
        start, stop = max(first, at), min(first + length, at + rows)
        if start < stop:
            full = group * rows - at
            found.append(_piece(part, 0, full + start, full + stop, 1, start - first))
        at += rows
    return found


def num_elements(piece: Piece, full: Sequence[int]) -> int:
    """Number of elements that the piece has in a full tensor of shape `full`."""
    return math.prod(full) // full[piece.dim] * (piece.stop - piece.start)


def even_dim(rule: Rule, shape: ModelShape, part: int, *, size: int) -> int | None:
    """The dimension along which rank r of `size` holds the r-th of equal slices of the full tensor;
    None where the ranks hold something else: all of it, or a vocabulary with padding at its end."""
    found = [
        [piece for piece in pieces_of(rule, shape, rank=rank, size=size) if piece.part == part]
        for rank in range(size)
    ]
    if size == 1 or any(len(pieces) != 1 for pieces in found):
        return None
    dim, rows = found[0][0].dim, found[0][0].stop
    slices = [(dim, rank * rows, (rank + 1) * rows) for rank in range(size)]
    even = [(piece.dim, piece.start, piece.stop) for (piece,) in found] == slices
    return dim if even else None


@dataclass(kw_only=True, frozen=True, slots=True)
class Holder:
    """The weights that one trainer rank holds."""

    rank: int
    tensor: tuple[int, int]
    """The rank's place in its tensor-parallel group, and the group's size."""
    expert_tensor: tuple[int, int]
    """The rank's place in the group that its experts are cut over, and the group's size."""
    names: frozenset[str]
    """Megatron names of its weights."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Take:
    """A piece and the rank that it is taken from."""

    tensor: int
    """Index of the full tensor, in Hugging Face order."""
    rule: int
    rank: int
    piece: Piece
    num_bytes: int


@dataclass(kw_only=True, frozen=True, slots=True)
class RefitPlan:
    """All takes, in Hugging Face order."""

    takes: tuple[Take, ...]

    @property
    def total_bytes(self) -> int:
        return sum(take.num_bytes for take in self.takes)

    def bytes_by_rank(self) -> dict[int, int]:
        """Bytes that each trainer rank sends."""
        found: dict[int, int] = defaultdict(int)
        for take in self.takes:
            found[take.rank] += take.num_bytes
        return dict(found)

    def of_rank(self, rank: int) -> dict[int, list[Take]]:
        """Tensor index -> what `rank` gives of it."""
        found: dict[int, list[Take]] = defaultdict(list)
        for take in self.takes:
            if take.rank == rank:
                found[take.tensor].append(take)
        return dict(found)


def plan_refit(
    rules: Sequence[Rule], shape: ModelShape, holders: Sequence[Holder], *, dtype: torch.dtype
) -> RefitPlan:
    """Cover every full tensor once; of ranks that hold the same, the one with the least to send so
    far (then the lowest) gives it. RuntimeError if nobody holds a weight."""
    sent = {holder.rank: 0 for holder in holders}
    takes: list[Take] = []
    first = 0
    for number, rule in enumerate(rules):
        itemsize = dtype_of(rule, dtype).itemsize
        having = [holder for holder in holders if rule.megatron in holder.names]
        by_place: dict[int, list[Holder]] = defaultdict(list)
        for holder in having:
            by_place[_place(rule, holder)[0]].append(holder)
        shapes = hf_shapes(rule, shape)
        covered = [0] * len(shapes)
        for place, copies in sorted(by_place.items()):
            size = _place(rule, copies[0])[1]
            if rule.tp_dim is None and place == 0:
                copies = having  # every rank of the group has all of it
            chosen = min(copies, key=lambda holder: (sent[holder.rank], holder.rank))
            for piece in pieces_of(rule, shape, rank=place, size=size):
                elements = num_elements(piece, shapes[piece.part])
                covered[piece.part] += elements
                sent[chosen.rank] += elements * itemsize
                takes.append(
                    Take(
                        tensor=first + piece.part,
                        rule=number,
                        rank=chosen.rank,
                        piece=piece,
                        num_bytes=elements * itemsize,
                    )
                )
        if covered != [math.prod(full) for full in shapes]:
            raise RuntimeError(
                f"no rank holds {rule.megatron}, or only some of its shards are held"
            )
        first += len(rule.hf)
    return RefitPlan(takes=tuple(sorted(takes, key=lambda take: take.tensor)))


def _place(rule: Rule, holder: Holder) -> tuple[int, int]:
    return holder.expert_tensor if rule.expert else holder.tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class Stream:
    """Tensors that a leader, the first rank of a tensor-parallel group, sends to every engine
    worker."""

    leader: int
    rounds: tuple[tuple[int, ...], ...]
    """Indices of the full tensors of each round: consecutive ones of the leader's own."""


def plan_streams(
    leaders: Sequence[int], num_bytes: Sequence[int], bucket_bytes: int
) -> tuple[Stream, ...]:
    """Plan rounds in which every leader sends a bucket at the same time: together at most
    `bucket_bytes` on an engine worker, but for a tensor larger than its leader's share.

    `leaders`: each tensor's. All streams have the same number of rounds; short ones end empty.
    """
    share = bucket_bytes // len(set(leaders))
    streams: dict[int, list[list[int]]] = {}
    for index, (leader, size) in enumerate(zip(leaders, num_bytes, strict=True)):
        rounds = streams.setdefault(leader, [[]])
        if rounds[-1] and sum(num_bytes[i] for i in rounds[-1]) + size > share:
            rounds.append([])
        rounds[-1].append(index)
    longest = max(len(rounds) for rounds in streams.values())
    return tuple(
        Stream(
            leader=leader,
            rounds=tuple(tuple(r) for r in [*rounds, *[[]] * (longest - len(rounds))]),
        )
        for leader, rounds in sorted(streams.items())
    )
