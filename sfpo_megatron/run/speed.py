"""What a train step did a second: tokens, and the share of the trainer's peak that it reached."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.planner.hardware import gpu_named
from sfpo_megatron.planner.time import forward_flops
from sfpo_megatron.types import RolloutBatch


def speed_metrics(
    config: RunConfig, policy: Policy, batch: RolloutBatch, metrics: Mapping[str, float]
) -> dict[str, float]:
    """`speed/...` of a step with these `metrics`, among them its times. Other ranks than 0 have no
    time of generation, and get no speed of it. Not collective."""
    num_ranks = policy.control.size
    num_tokens, num_passes = batch.token_ids.numel(), metrics["num_passes"]
    num_devices = num_ranks + _num_engine_devices(config)
    found = {
        "generation_tokens_per_s": (int(batch.trained_lengths.sum()), "time/generate_s"),
        "training_tokens_per_s": (num_tokens * num_passes, "time/passes_s"),
        "tokens_per_s": (num_tokens, "time/step_s"),
        "tokens_per_s_per_device": (num_tokens / num_devices, "time/step_s"),
    }
    if peak := num_ranks * _peak_flops(policy.dtype):
        forward = forward_flops(policy.shape, num_tokens / batch.num_rollouts)
        # A backward is two forwards.
        found["mfu"] = (3 * forward * num_tokens * num_passes / peak, "time/passes_s")
    return {f"speed/{name}": n / metrics[s] for name, (n, s) in found.items() if metrics.get(s)}


def _num_engine_devices(config: RunConfig) -> int:
    """Devices that are the engines' alone."""
    rollout = config.rollout
    if rollout.placement == "colocated" or config.debug.train_only is not None:
        return 0
    return rollout.num_engine_ranks


def _peak_flops(dtype: str) -> float:
    """Operations a second of one GPU; 0 where that is not known."""
    if dtype == "float32" or not torch.cuda.is_available():
        return 0.0
    gpu = gpu_named(torch.cuda.get_device_name())
    return gpu.flops if gpu is not None else 0.0
