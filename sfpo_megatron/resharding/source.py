"""Megatron shards -> full Hugging Face tensors, by one of two ways.

`write`: this rank's pieces straight into memory that all ranks of a node share; no communication,
no extra memory.

Iterating: one full tensor after another on rank 0. For each weight, in Hugging Face order: one of
the tensor-parallel groups that hold it (the one with the lowest ranks; other pipeline stages,
expert-parallel ranks and data-parallel copies sit out) gathers its shards, the group's first rank
joins them, splits them into the Hugging Face parts and sends these to rank 0. Peak extra memory is
one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.families.rules import Rule, dtype_of, hf_shapes, join, split
from sfpo_megatron.families.table import rules_of
from sfpo_megatron.mcore.groups import tensor_parallel_group
from sfpo_megatron.mcore.model import DTYPES, named_params
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.resharding.checksums import checksum
from sfpo_megatron.resharding.plan import Holder, Piece, RefitPlan, Take, plan_refit

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup


class MegatronWeightSource:
    """All weights of the policy under their Hugging Face names.

    Construction and each iteration are collective: every trainer rank goes through all of it, in
    lockstep. Iterating yields (name, tensor) in `metadata()`'s order; the tensor holds data on
    rank 0 only (empty elsewhere).
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._rules = rules_of(policy.shape)
        self._dtype = DTYPES[policy.config.model.dtype]
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
        self._parts: dict[int, list[Tensor]] = {}
        self._leader: list[int] = []
        self.plan = self._make_plan()
        self._takes = self.plan.of_rank(dist.get_rank())

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, the same list on every rank."""
        return self._metadata

    def prepare(self) -> None:
        """Before `write` or `checksum`: finish a gather that is still due. Collective."""
        self._policy.shards.params_ready()

    @property
    def control(self) -> ControlGroup:
        """All trainer ranks."""
        return self._policy.control

    @torch.no_grad()
    def write(self, index: int, target: Tensor) -> None:
        """This rank's pieces of tensor `index` (of `metadata()`) into the full tensor `target`."""
        for take in self._takes.get(index, ()):
            region = target.narrow(take.piece.dim, take.piece.start, _length(take.piece))
            grouped = self._source_of(take)
            region.view(grouped.shape if take.piece.groups > 1 else region.shape).copy_(grouped)

    def checksum(self, index: int) -> int:
        """Of this rank's pieces of tensor `index`; the ranks' sums add up, mod 2^64."""
        total = 0
        meta = self._metadata[index]
        for take in self._takes.get(index, ()):
            piece, full = take.piece, meta.shape
            here = list(full)
            here[piece.dim] = _length(piece)
            region = self._source_of(take).to(meta.dtype).reshape(here)
            total += checksum(region, full, dim=piece.dim, start=piece.start)
        return total

    def _source_of(self, take: Take) -> Tensor:
        """The piece in this rank's shard: [groups, rows, ...] where it is in several blocks."""
        shard, piece = self._params[self._rules[take.rule].megatron].detach(), take.piece
        if piece.groups == 1:
            return shard.narrow(piece.dim, piece.source_start, _length(piece))
        blocks = shard.view(piece.groups, -1, *shard.shape[1:])
        return blocks[:, piece.source_start : piece.source_stop]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.prepare()
        for rule, leader in zip(self._rules, self._leader, strict=True):
            yield from zip(rule.hf, self._parts_on_rank_0(rule, leader), strict=True)

    @property
    def leaders(self) -> list[int]:
        """Of each tensor of `metadata()`: the first rank of the tensor-parallel group that gives
        it where tensors are gathered."""
        pairs = zip(self._rules, self._leader, strict=True)
        return [leader for rule, leader in pairs for _ in rule.hf]

    def gather(self, index: int) -> Tensor | None:
        """Full tensor `index` on its leader, None elsewhere. Collective in the leader's
        tensor-parallel group; the parts of a rule are asked for one after another, and the shards
        are gathered once."""
        number, part = self._rule_of[index]
        rule, leader = self._rules[number], self._leader[number]
        if leader != self._leader_here[rule.expert]:
            return None
        if part == 0:
            self._parts[leader] = self._gathered_parts(rule, leader)
        return self._parts[leader][part] if dist.get_rank() == leader else None

    @torch.no_grad()
    def _gathered_parts(self, rule: Rule, leader: int) -> list[Tensor]:
        shards = self._gather_shards(rule, self._params[rule.megatron].detach())
        if dist.get_rank() != leader:
            return []
        return split(rule, join(rule, shards), self._policy.shape)

    def _make_plan(self) -> RefitPlan:
        """From what every rank holds; also, for each rule, the lowest leader among the
        tensor-parallel groups that hold its tensor. Collective."""
        layout = self._policy.layout
        here = {
            "leaders": [self._leader_here[False], self._leader_here[True]],
            "tensor": [layout.tensor_rank, layout.tensor_size],
            "expert_tensor": [layout.expert_tensor_rank, layout.expert_tensor_size],
            "rules": [i for i, rule in enumerate(self._rules) if rule.megatron in self._params],
        }
        holders = []
        leader = [dist.get_world_size()] * len(self._rules)
        for rank, found in enumerate(self._policy.control.all_gather_json(here)):
            names = frozenset(self._rules[i].megatron for i in found["rules"])
            holders.append(
                Holder(
                    rank=rank,
                    tensor=tuple(found["tensor"]),
                    expert_tensor=tuple(found["expert_tensor"]),
                    names=names,
                )
            )
            for i in found["rules"]:
                leader[i] = min(leader[i], found["leaders"][self._rules[i].expert])
        self._leader = leader
        return plan_refit(self._rules, self._policy.shape, holders, dtype=self._dtype)

    @torch.no_grad()
    def _parts_on_rank_0(self, rule: Rule, leader: int) -> list[Tensor]:
        """The Hugging Face tensors of `rule` on rank 0, empty ones elsewhere."""
        rank = dist.get_rank()
        parts = [torch.empty(0) for _ in rule.hf]
        if leader == self._leader_here[rule.expert]:
            parts = self._gathered_parts(rule, leader)
        if leader != 0 and rank == leader:
            for part in parts:
                dist.send(part.contiguous(), dst=0)
        elif leader != 0 and rank == 0:
            device = next(iter(self._params.values())).device
            dtype = dtype_of(rule, self._dtype)
            for i, size in enumerate(hf_shapes(rule, self._policy.shape)):
                parts[i] = torch.empty(size, dtype=dtype, device=device)
                dist.recv(parts[i], src=leader)
        return parts if rank == 0 else [torch.empty(0) for _ in rule.hf]

    def _gather_shards(self, rule: Rule, shard: Tensor) -> list[Tensor]:
        """All shards of a cut tensor; every rank of the tensor-parallel group calls this."""
        group = tensor_parallel_group(expert=rule.expert)
        if rule.tp_dim is None or group.size() == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return shards


def _length(piece: Piece) -> int:
    return piece.stop - piece.start
