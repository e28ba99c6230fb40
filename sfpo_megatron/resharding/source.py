"""Megatron shards -> full Hugging Face tensors, one after another, on rank 0.

For each weight, in Hugging Face order: the pipeline stage that owns it gathers its tensor-parallel
shards, the stage's first rank joins them and sends the whole to rank 0. Only data-parallel rank 0
takes part; peak extra memory is one weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.rules import Rule, hf_shapes, join, split
from sfpo_megatron.families.table import rules_of
from sfpo_megatron.mcore.groups import stage_leaders, tensor_parallel_group
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
        self._owner = self._find_owners()

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, the same list on every rank."""
        return [
            TensorMeta(name=name, shape=shape, dtype=self._dtype)
            for rule in self._rules
            for name, shape in zip(rule.hf, hf_shapes(rule, self._policy.shape), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._policy.shards.params_ready()
        for rule in self._rules:
            whole = self._whole(rule)
            if whole is None:
                yield from ((name, torch.empty(0)) for name in rule.hf)
            else:
                yield from zip(rule.hf, split(rule, whole, self._policy.shape), strict=True)

    def _find_owners(self) -> dict[str, int]:
        """Megatron name -> first pipeline stage that has it."""
        stage = self._policy.layout.pipeline_rank
        everyone = self._policy.control.all_gather_json([stage, sorted(self._params)])
        owner: dict[str, int] = {}
        for stage, names in sorted(everyone, key=lambda item: -item[0]):
            owner.update(dict.fromkeys(names, stage))
        missing = [rule.megatron for rule in self._rules if rule.megatron not in owner]
        if missing:
            raise RuntimeError(f"no pipeline stage holds {missing[0]} ({len(missing)} such names)")
        return owner

    @torch.no_grad()
    def _whole(self, rule: Rule) -> Tensor | None:
        """The whole Megatron tensor on rank 0, None elsewhere."""
        layout, stage = self._policy.layout, self._owner[rule.megatron]
        if layout.data_rank != 0:
            return None
        whole = None
        if layout.pipeline_rank == stage:
            whole = self._join_tensor_parallel(rule, self._params[rule.megatron].detach())
        if layout.tensor_rank != 0 or stage == 0:
            return whole if dist.get_rank() == 0 else None
        leader = stage_leaders()[stage]
        if dist.get_rank() == leader:
            assert whole is not None
            # Shapes differ by rule: the receiver knows them from the padded whole's own.
            dist.send(torch.tensor(whole.shape, device=whole.device), dst=0)
            dist.send(whole.contiguous(), dst=0)
        elif dist.get_rank() == 0:
            device = next(iter(self._params.values())).device
            dims = 2 if len(hf_shapes(rule, self._policy.shape)[0]) == 2 else 1
            size = torch.empty(dims, dtype=torch.int64, device=device)
            dist.recv(size, src=leader)
            whole = torch.empty(size.tolist(), dtype=self._dtype, device=device)
            dist.recv(whole, src=leader)
            return whole
        return None

    def _join_tensor_parallel(self, rule: Rule, shard: Tensor) -> Tensor:
        """All-gather over this stage's tensor-parallel group; every rank of it calls this."""
        size = self._policy.layout.tensor_size
        if rule.tp_dim is None or size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(size)]
        dist.all_gather(shards, shard.contiguous(), group=tensor_parallel_group())
        return join(rule, shards)
