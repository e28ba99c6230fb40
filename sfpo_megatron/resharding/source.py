"""Megatron shards -> full Hugging Face tensors, one after another, on rank 0.

For each weight, in Hugging Face order: one of the tensor-parallel groups that hold it (the one with
the lowest ranks; other pipeline stages, expert-parallel ranks and data-parallel copies sit out)
gathers its shards, the group's first rank joins them, splits them into the Hugging Face parts and
sends these to rank 0. Peak extra memory is one weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.rules import Rule, hf_shapes, join, split
from sfpo_megatron.families.table import rules_of
from sfpo_megatron.mcore.groups import tensor_parallel_group
from sfpo_megatron.mcore.model import DTYPES, named_params
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.resharding.transports.manifest import TensorMeta


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
        self._leader = self._choose_leaders()

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, the same list on every rank."""
        return [
            TensorMeta(name=name, shape=shape, dtype=self._dtype)
            for rule in self._rules
            for name, shape in zip(rule.hf, hf_shapes(rule, self._policy.shape), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._policy.shards.params_ready()
        for rule, leader in zip(self._rules, self._leader, strict=True):
            yield from zip(rule.hf, self._parts_on_rank_0(rule, leader), strict=True)

    def _choose_leaders(self) -> list[int]:
        """For each rule, the lowest leader among the groups that hold its tensor. Collective."""
        held = [i for i, rule in enumerate(self._rules) if rule.megatron in self._params]
        here = [self._leader_here[False], self._leader_here[True], held]
        leader = [dist.get_world_size()] * len(self._rules)
        for dense, expert, indices in self._policy.control.all_gather_json(here):
            for i in indices:
                leader[i] = min(leader[i], expert if self._rules[i].expert else dense)
        for rule, found in zip(self._rules, leader, strict=True):
            if found == dist.get_world_size():
                raise RuntimeError(f"no rank holds {rule.megatron}")
        return leader

    @torch.no_grad()
    def _parts_on_rank_0(self, rule: Rule, leader: int) -> list[Tensor]:
        """The Hugging Face tensors of `rule` on rank 0, empty ones elsewhere."""
        rank = dist.get_rank()
        parts = [torch.empty(0) for _ in rule.hf]
        if leader == self._leader_here[rule.expert]:
            shards = self._gather_shards(rule, self._params[rule.megatron].detach())
            if rank == leader:
                parts = split(rule, join(rule, shards), self._policy.shape)
        if leader != 0 and rank == leader:
            for part in parts:
                dist.send(part.contiguous(), dst=0)
        elif leader != 0 and rank == 0:
            device = next(iter(self._params.values())).device
            for i, size in enumerate(hf_shapes(rule, self._policy.shape)):
                parts[i] = torch.empty(size, dtype=self._dtype, device=device)
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
