"""Policies on Megatron's optimizers, and what their optimizers hold. For the ranks of tests/dist.

Megatron is imported inside functions: pytest's own process, which imports the test modules, must
not, since `mcore` prepares a process for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from made.bits import same_bits
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.mcore.shards.main_params import MainParams

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LOSS_SCALE = {"initial_loss_scale": 2.0**10}  # of fp16
OFFLOAD = LOSS_SCALE | {"optimizer_cpu_offload": True, "pin_cpu_grads": False}
PRECISION_AWARE = {"use_precision_aware_optimizer": True}
FP32_MASTERS = PRECISION_AWARE | {"store_param_remainders": False}


@contextmanager
def bound_as(*kinds: type[MainParams]) -> Iterator[None]:
    """Policies built inside take one of these bindings to the main params."""
    from sfpo_megatron.mcore.shards import kinds as module

    with patch.object(module, "KINDS", kinds):
        yield


def offloaded_policy(
    bench: Workbench,
    fraction: float,
    dtype: str = "bfloat16",
    *,
    bound: type[MainParams] | None = None,
    lr: float | None = None,
    **extra: Any,
) -> Policy:
    """One CPU optimizer a param at fraction 1 (overlapped copies), one for all at 0.5.

    bound: the binding to its main params in place of the one that is chosen, HybridMainParams.
    extra: other settings of the optimizer.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from offload import offloading

    from sfpo_megatron.mcore.shards.hybrid import HybridMainParams

    settings = OFFLOAD | {
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": fraction == 1.0,
    }
    given = {} if lr is None else {"lr": lr}
    with offloading(), nullcontext() if bound is None else bound_as(bound):
        policy = bench.policy(dtype=dtype, optimizer=settings | extra, **given)
    (member,) = policy.optimizer.chained_optimizers
    hybrid = member.optimizer
    assert isinstance(hybrid, HybridDeviceOptimizer)
    assert len(hybrid.gpu_params_map_cpu_copy) > 0, "nothing is offloaded"
    assert (hybrid.gpu_optimizer is None) == (fraction == 1.0)
    assert isinstance(policy.shards._members[0], bound or HybridMainParams)
    return policy


def precision_aware_policy(bench: Workbench, optimizer: dict[str, Any], dtype: str) -> Policy:
    """In pieces that do not divide a shard, several a shard."""
    from sfpo_megatron.mcore.shards.precision_aware import PrecisionAwareMainParams

    class InPieces(PrecisionAwareMainParams):
        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer, staging_numel=1000)

    with bound_as(InPieces):
        policy = bench.policy(dtype=dtype, optimizer=optimizer)
    (member,) = policy.optimizer.chained_optimizers
    assert member.optimizer.master_weights and member.optimizer.use_decoupled_grad
    return policy


def live_params(policy: Policy) -> list[Tensor]:
    return [param for chunk in policy.chunks for param in chunk.parameters()]


def stale(policy: Policy) -> int:
    """How many live model params are not bf16(main param). Collective over data-parallel ranks."""
    pairs = gathered_main_params(policy)
    assert any(live.dtype == torch.bfloat16 for live, _ in pairs)
    return sum(not same_bits(live, main.to(live.dtype)) for live, main in pairs)


def adam_states(policy: Policy) -> Iterator[dict[str, Any]]:
    """Adam's state of every main param of this rank."""
    for member in policy.optimizer.chained_optimizers:
        yield from member.optimizer.state.values()


def gathered_main_params(
    policy: Policy, of: Callable[[Any, Tensor], Tensor] = lambda member, shard: shard
) -> list[tuple[Tensor, Tensor]]:
    """(live model param, its whole fp32 main param) for every param of this rank; with `of`, what
    an optimizer has of each shard in place of the shard itself.

    Independent of Megatron's own gather: each data-parallel rank puts its shard's bits into zeros,
    and the bits are added up as integers (each element has exactly one owner, which is checked).
    Collective over data-parallel ranks; an expert's copies are on its expert-data-parallel ranks.
    """
    from megatron.core import parallel_state

    everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = []
    for member in policy.optimizer.chained_optimizers:
        params = flat(member.model_float16_groups) + flat(member.model_fp32_groups)
        shards = flat(member.shard_fp32_from_float16_groups) + flat(member.shard_fp32_groups)
        shard_of = {id(p): of(member, shard) for p, shard in zip(params, shards, strict=True)}
        of_experts = {g["is_expert_parallel"] for g in member.optimizer.param_groups}
        assert len(of_experts) == 1, "one optimizer for experts and the rest"
        expert = True in of_experts
        group = parallel_state.get_expert_data_parallel_group() if expert else everyone
        for param in live_params(policy):
            if getattr(param, "allreduce", True) is expert:
                continue  # the other member's
            bits = torch.zeros(param.numel(), dtype=torch.int32)
            owners = torch.zeros(param.numel(), dtype=torch.int32)
            shard = shard_of.get(id(param))
            if shard is not None:
                span = member._get_model_param_range_map(param)["param"]
                bits[span.start : span.end] = shard.detach().view(-1).view(torch.int32)
                owners[span.start : span.end] = 1
            dist.all_reduce(bits, group=group)
            dist.all_reduce(owners, group=group)
            assert owners.eq(1).all(), "a main param has no owner, or two"
            found.append((param.detach(), bits.view(torch.float32).view(param.shape)))
    return found


def flat(groups: Any) -> list[Tensor]:
    return [tensor for group in groups for tensor in group]
