"""What engines and refit cannot do together with the rest of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.gpus import GPUS_PER_NODE


def engines(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.tensor_parallel > GPUS_PER_NODE and config.debug.train_only is None:
        yield Problem(
            "rollout.tensor_parallel",
            str(rollout.tensor_parallel),
            f"at most the GPUs of a node, which are {GPUS_PER_NODE} on most machines: an engine "
            "stays on one node",
            "lower it, set rollout.quantization, or take nodes with as many",
            "warning",
        )
    if rollout.async_steps and not config.objective.importance_sampling.is_on:
        yield Problem(
            "rollout.async_steps",
            "1 without objective.importance_sampling",
            "a correction for rollouts by weights one update old",
            "set objective.importance_sampling.weight: token",
            "warning",
        )
    if "zero_variance" in rollout.drop_groups and config.objective.zero_variance_groups == "mask":
        yield Problem(
            "rollout.drop_groups",
            "zero_variance with objective.zero_variance_groups: mask",
            "one of the two",
            "with both, only groups that are taken back after rollout.max_rounds are masked",
            "warning",
        )
    if rollout.drop_groups and config.debug.train_only:
        yield Problem(
            "rollout.drop_groups",
            "set with debug.train_only",
            "engines to make other groups with",
            "saved batches are trained on as they are",
            "warning",
        )
    if rollout.quantization and config.model.dtype == "float32":
        yield Problem(
            "rollout.quantization",
            f"{rollout.quantization} with model.dtype: float32",
            "bfloat16 or float16, which vLLM can quantize online",
            "set model.dtype: bfloat16",
        )
    if rollout.quantization and not config.objective.importance_sampling.is_on:
        yield Problem(
            "rollout.quantization",
            f"{rollout.quantization} without objective.importance_sampling",
            "a correction for rollouts by other weights than the trainer's",
            "set objective.importance_sampling.weight: token",
            "warning",
        )


def colocated(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Engines that share the trainer's devices: one of the two has the memory at a time."""
    rollout, parallel = config.rollout, config.parallel
    if rollout.placement != "colocated":
        return
    if rollout.async_steps:
        yield Problem(
            "rollout.async_steps",
            f"{rollout.async_steps} with rollout.placement: colocated",
            "0",
            "set it to 0, or the placement to dedicated: engines sleep while the trainer computes",
        )
    ranks = world_size if parallel.data is None else parallel.data * parallel.model_size
    engine_ranks = rollout.num_engine_ranks
    if ranks is not None and engine_ranks != ranks:
        fitting, rest = divmod(ranks, rollout.tensor_parallel)
        fix = f"set rollout.num_engines={fitting}" if not rest else "change rollout.tensor_parallel"
        yield Problem(
            "rollout.num_engines",
            f"{rollout.num_engines} (x tensor_parallel {rollout.tensor_parallel}) with "
            "rollout.placement: colocated",
            f"engines on all {ranks} devices of the trainer, and no others",
            fix,
        )
    if config.refit.transport.startswith("nccl"):
        yield Problem(
            "refit.transport",
            f"{config.refit.transport} with rollout.placement: colocated",
            "one without a communicator over trainer and engines",
            "set refit.transport: auto: no device may be in an NCCL communicator twice",
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower():
            yield Problem(
                "rollout.placement",
                f"colocated with {name}={os.environ[name]}",
                "no expandable_segments:True, which engines inherit",
                f"unset {name}: vLLM's sleep mode cannot free such segments",
            )
    yield from _fixed_addresses(config)


def _fixed_addresses(config: RunConfig) -> Iterator[Problem]:
    """What comes back from host memory lies elsewhere on the device."""
    graphs = ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl")
    given = [("transformer", name, config.megatron.transformer.get(name)) for name in graphs]
    given.append(("ddp", "nccl_ub", config.megatron.ddp.get("nccl_ub")))
    for section, name, value in given:
        if value not in (None, False, "none"):
            yield Problem(
                f"megatron.{section}.{name}",
                f"{value} with rollout.placement: colocated",
                "nothing that keeps addresses of params or grads",
                "remove it: they leave the device while engines generate",
            )
