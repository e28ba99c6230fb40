"""Checkpoints of a policy, and its whole state to compare. For the ranks of tests/dist.

Megatron is imported inside functions: pytest's own process must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from made.bits import same_bits
from made.policies import gathered_main_params
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy


def trained(bench: Workbench, **settings: Any) -> Policy:
    """A policy after one pass (two optimizer steps), three ticks of the schedule."""
    policy = bench.policy(**settings)
    policy.scheduler.step(increment=3)
    bench.one_pass(policy, bench.prepared(policy))()
    return policy


def save(bench: Workbench, policy: Policy, name: str, **settings: Any) -> Path:
    """A whole checkpoint with its manifest. Collective."""
    from sfpo_megatron.checkpoints.manifest import write_manifest
    from sfpo_megatron.mcore.checkpoint import begin_save

    directory = bench.directory / name
    if bench.rank == 0:
        directory.mkdir()
    dist.barrier()
    settings = {"step": 3, "form": "native"} | settings
    digests = begin_save(policy, directory, **settings).finish()
    if bench.rank == 0:
        write_manifest(directory, settings["step"], digests)
    dist.barrier()
    return directory


def load(policy: Policy, directory: Path) -> None:
    from sfpo_megatron.checkpoints.manifest import faults
    from sfpo_megatron.mcore import checkpoint

    assert not faults(directory)
    checkpoint.load(policy, directory)


def training_state(bench: Workbench, policy: Policy) -> dict[str, Tensor]:
    """Model params, main params and moments as Hugging Face tensors. Collective."""
    policy.shards.params_ready()
    found = {f"model/{n}": t for n, t in bench.hf_weights(policy).items()}
    parts: dict[str, Any] = {"main": lambda member, shard: shard}
    for moment in ("exp_avg", "exp_avg_sq"):
        parts[moment] = lambda member, shard, m=moment: member.optimizer.state[shard][m]
    for part, of in parts.items():
        whole = {id_of(param): value for param, value in gathered_main_params(policy, of)}
        tensors = bench.hf_tensors(policy, lambda param, whole=whole: whole[id_of(param)])
        found |= {f"{part}/{name}": tensor for name, tensor in tensors.items()}
    return found


def id_of(param: Tensor) -> tuple[int, torch.Size]:
    return param.data_ptr(), param.shape


def step_counts(policy: Policy) -> set[float]:
    return set(policy.shards.step_counts())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    odd = [name for name in found if not same_bits(found[name], expected[name])]
    assert not odd, f"{len(odd)} of {len(found)} differ: {odd[:4]}"
