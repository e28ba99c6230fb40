"""What SGD goes together with in Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig


def sgd(config: RunConfig) -> Iterator[Problem]:
    """SGD keeps its momentum beside main params that are neither sharded nor offloaded."""
    if config.megatron.optimizer.get("optimizer", "adam") != "sgd":
        return
    if config.megatron.optimizer.get("optimizer_cpu_offload"):
        yield Problem(
            "megatron.optimizer.optimizer_cpu_offload",
            "true with megatron.optimizer.optimizer: sgd",
            "false",
            "leave it out, or use adam: Megatron offloads only shards of the distributed "
            "optimizer, which takes no SGD",
        )
    if config.megatron.ddp.get("use_distributed_optimizer", True):
        yield Problem(
            "megatron.ddp.use_distributed_optimizer",
            "true with megatron.optimizer.optimizer: sgd",
            "false",
            "set megatron.ddp.use_distributed_optimizer=false: Megatron shards no SGD",
        )
