"""Megatron shards -> full Hugging Face tensors, for whoever sends or writes them.

    write(i, target)   this rank's pieces, straight into memory that all ranks of a node share
    gather(i)          the full tensor on its leader
    iteration          on rank 0, one full tensor after another
    everywhere()       the same on every rank
    shards()           every rank's slice of one tensor after another

Writing communicates nothing and takes no memory. In the others, for each tensor in Hugging Face
order, one of the tensor-parallel groups that hold it (the one with the lowest ranks; other pipeline
stages, expert-parallel ranks and data-parallel copies sit out) gathers it, and the group's first
rank, the leader, passes it on. Peak extra memory is one tensor and a slice or two of it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.families.operations import dtype_of, split
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.table import hf_shapes, rules_of
from sfpo_megatron.mcore.groups import tensor_parallel_group
from sfpo_megatron.mcore.model import named_params
from sfpo_megatron.mcore.settings import DTYPES
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.resharding.checksums import checksum
from sfpo_megatron.resharding.plan import Holder, Piece, even_dim, pieces_of, plan_refit

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup


class _Held(NamedTuple):
    """What a rank tells the others of its weights."""

    leaders: tuple[int, int]
    """First rank of its tensor-parallel group, and of its experts'."""
    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]
    rules: list[int]
    """Indices of the rules whose tensors it holds a part of."""


class MegatronWeightSource:
    """All weights of the policy under their Hugging Face names.

    Construction and each iteration are collective: every trainer rank goes through all of it, in
    lockstep. Iterating yields (name, tensor) in `metadata()`'s order; the tensor holds data on
    rank 0 only (empty elsewhere).
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._rules = rules_of(policy.shape)
        self._dtype = DTYPES[policy.dtype]
        self._params = dict(named_params(policy.chunks))
        # The first rank of this rank's tensor-parallel groups: it speaks for the group.
        self._leader_here = {
            expert: dist.get_process_group_ranks(tensor_parallel_group(expert=expert))[0]
            for expert in (False, True)
        }
        self._metadata = [
            TensorMeta(name=name, shape=shape, dtype=dtype_of(rule, self._dtype))
            for rule in self._rules
            for name, shape in zip(rule.hf, hf_shapes(rule, self._policy.shape), strict=True)
        ]
        self._rule_of = [(i, part) for i, r in enumerate(self._rules) for part in range(len(r.hf))]
        self._device = next(iter(self._params.values())).device
        self.shard_dims = [
            even_dim(rule, policy.shape, part, size=self._place(rule)[1])
            for rule in self._rules
            for part in range(len(rule.hf))
        ]
        """Dimension of each tensor of `metadata()` that tensor-parallel rank r has the r-th equal
        slice of; None where ranks have all of it, or uneven slices (`shards` gathers it)."""
        holders, leaders = _ask_holders(policy, self._rules, self._params, self._leader_here)
        self.leaders = [leaders[number] for number, _ in self._rule_of]
        """Rank that gives each tensor of `metadata()` where tensors are gathered: the first of a
        tensor-parallel group."""
        self.plan = plan_refit(self._rules, policy.shape, holders, dtype=self._dtype)
        self._takes = self.plan.of_rank(dist.get_rank())

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, the same list on every rank."""
        return self._metadata

    def prepare(self) -> None:
        """Finish a gather that is still due, before `write` or `checksum`. Collective."""
        self._policy.shards.params_ready()

    @property
    def control(self) -> ControlGroup:
        """All trainer ranks."""
        return self._policy.control

    @property
    def sharded(self) -> MegatronWeightSource:
        """This source: its tensors lie in pieces on the ranks."""
        return self

    @torch.no_grad()
    def write(self, index: int, target: Tensor) -> None:
        """Copy this rank's pieces of tensor `index` (of `metadata()`) into full tensor `target`. On
        CUDA the copy may still be under way on the current stream when this returns."""
        for take in self._takes.get(index, ()):
            region = target.narrow(take.piece.dim, take.piece.start, _length(take.piece))
            grouped = self._grouped(self._rules[take.rule], take.piece)
            shape = grouped.shape if take.piece.groups > 1 else region.shape
            put(grouped, into=region.view(shape))

    def checksum(self, index: int) -> int:
        """Checksum of this rank's pieces of tensor `index`; the ranks' sums add up, mod 2^64."""
        total = 0
        meta = self._metadata[index]
        for take in self._takes.get(index, ()):
            piece = take.piece
            region = self._region(self._rules[take.rule], piece, meta.shape).to(meta.dtype)
            total += checksum(region, meta.shape, dim=piece.dim, start=piece.start)
        return total

    def _region(self, rule: Rule, piece: Piece, full: tuple[int, ...]) -> Tensor:
        """The piece as it lies in the full tensor."""
        here = list(full)
        here[piece.dim] = _length(piece)
        return self._grouped(rule, piece).reshape(here)

    def _grouped(self, rule: Rule, piece: Piece) -> Tensor:
        """The piece in this rank's shard: [groups, rows, ...] where it is in several blocks."""
        shard = self._params[rule.megatron].detach()
        if piece.groups == 1:
            return shard.narrow(piece.dim, piece.source_start, _length(piece))
        blocks = shard.view(piece.groups, -1, *shard.shape[1:])
        return blocks[:, piece.source_start : piece.source_stop]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.prepare()
        rank = dist.get_rank()
        for index, (meta, leader) in enumerate(zip(self._metadata, self.leaders, strict=True)):
            tensor = self.gather(index)
            if leader != 0 and tensor is not None:
                dist.send(tensor.contiguous(), dst=0)
            elif leader != 0 and rank == 0:
                tensor = torch.empty(meta.shape, dtype=meta.dtype, device=self._device)
                dist.recv(tensor, src=leader)
            yield meta.name, torch.empty(0) if rank != 0 or tensor is None else tensor
            del tensor  # not beside the next one

    def everywhere(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) on every rank: each one's leader broadcasts it over the default
        group. Collective."""
        self.prepare()
        for index, (meta, leader) in enumerate(zip(self._metadata, self.leaders, strict=True)):
            gathered = self.gather(index)
            if gathered is None:
                gathered = torch.empty(meta.shape, dtype=meta.dtype, device=self._device)
            tensor = gathered.contiguous()
            dist.broadcast(tensor, src=leader)
            yield meta.name, tensor
            del gathered, tensor

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, this rank's slice of the full tensor, or all of it), where every rank has a
        part of every weight. Fused projections come apart by a copy of the shard; what is not cut
        evenly (a vocabulary, kv heads that ranks share) is gathered. Collective."""
        self.prepare()
        for index, (meta, dim) in enumerate(zip(self._metadata, self.shard_dims, strict=True)):
            yield meta.name, self._whole(index) if dim is None else self._slice(index)

    def gather(self, index: int) -> Tensor | None:
        """Full tensor `index` on its leader, None elsewhere. Collective in the leader's
        tensor-parallel group."""
        rule, leader = self._rule(index), self.leaders[index]
        if leader != self._leader_here[rule.expert]:
            return None
        whole = self._whole(index)
        return whole if dist.get_rank() == leader else None

    @torch.no_grad()
    def _whole(self, index: int) -> Tensor:
        """Gather full tensor `index` on every rank of this rank's tensor-parallel group: each part
        of a fused projection by itself, so that no more than one tensor and slices of it are held,
        but for a projection whose kv heads are fewer than the ranks. Collective in the group."""
        rule, dim, meta = self._rule(index), self.shard_dims[index], self._metadata[index]
        group = tensor_parallel_group(expert=rule.expert)
        if rule.tp_dim is None or group.size() == 1:
            return self._slice(index)
        is_even = dim is not None
        if not is_even:  # a vocabulary with its padding, or q, k and v of heads that ranks share
            assert rule.kind in ("vocab", "qkv"), rule
            mine = self._params[rule.megatron].detach().to(meta.dtype)
        else:
            mine = self._slice(index).contiguous()
        dim = dim or 0
        padded = [rows * group.size() if d == dim else rows for d, rows in enumerate(mine.shape)]
        whole = torch.empty(padded, dtype=meta.dtype, device=self._device)
        slices = list(whole.chunk(group.size(), dim=dim))
        if dim == 0:
            dist.all_gather(slices, mine, group=group)
        else:  # not contiguous: one after another
            for rank, target in zip(dist.get_process_group_ranks(group), slices, strict=True):
                sent = mine if rank == dist.get_rank() else torch.empty_like(mine)
                dist.broadcast(sent, src=rank, group=group)
                target.copy_(sent)
        if is_even:
            return whole
        return split(rule, whole, self._policy.shape)[self._rule_of[index][1]]

    @torch.no_grad()
    def _slice(self, index: int) -> Tensor:
        """What this rank's shard holds of full tensor `index`."""
        rule, part, meta = self._rule(index), self._rule_of[index][1], self._metadata[index]
        rank, size = self._place(rule)
        if rule.tp_dim is None:
            rank, size = 0, 1
        pieces = pieces_of(rule, self._policy.shape, rank=rank, size=size)
        (piece,) = (piece for piece in pieces if piece.part == part)
        return self._region(rule, piece, meta.shape).to(meta.dtype)

    def _rule(self, index: int) -> Rule:
        return self._rules[self._rule_of[index][0]]

    def _place(self, rule: Rule) -> tuple[int, int]:
        """This rank's number in the group that `rule`'s tensor is cut over; the group's size."""
        layout = self._policy.layout
        if rule.expert:
            return layout.expert_tensor_rank, layout.expert_tensor_size
        return layout.tensor_rank, layout.tensor_size


def _ask_holders(
    policy: Policy, rules: Sequence[Rule], held: Container[str], leader_here: Mapping[bool, int]
) -> tuple[list[Holder], list[int]]:
    """What every rank holds and, for each rule, the lowest leader among the tensor-parallel groups
    that hold its tensor. `held`: names of this rank's params; `leader_here`: the leader of its
    groups, by whether they are the experts'. Collective."""
    layout = policy.layout
    here = _Held(
        leaders=(leader_here[False], leader_here[True]),
        tensor=(layout.tensor_rank, layout.tensor_size),
        expert_tensor=(layout.expert_tensor_rank, layout.expert_tensor_size),
        rules=[i for i, rule in enumerate(rules) if rule.megatron in held],
    )
    holders = []
    leaders = [dist.get_world_size()] * len(rules)
    for rank, found in enumerate(policy.control.all_gather_json(here)):
        names = frozenset(rules[i].megatron for i in found.rules)
        holders.append(
            Holder(rank=rank, tensor=found.tensor, expert_tensor=found.expert_tensor, names=names)
        )
        for i in found.rules:
            leaders[i] = min(leaders[i], found.leaders[rules[i].expert])
    return holders, leaders


def _length(piece: Piece) -> int:
    return piece.stop - piece.start


def put(piece: Tensor, *, into: Tensor) -> None:
    """Copy a piece, on CUDA without a wait for it, unless `into` is a slice: from a device torch
    fills pageable memory of its own and copies on from there, before it is full if nobody waits
    (`copy_kernel_cuda` in ATen/native/cuda/Copy.cu; CUDA does not promise to wait by itself)."""
    into.copy_(piece, non_blocking=into.is_contiguous())
