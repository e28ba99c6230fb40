"""Optimizer modes that SFPO refuses at setup: editing their main params would be silently wrong."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from sfpo_megatron.mcore.shards.steppers import KINDS, kind_of, steppers


def refuse_unsupported(optimizer: MegatronOptimizer) -> None:
    """ValueError with the setting to change."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        raise _refusal(
            "megatron.optimizer.use_layer_wise_distributed_optimizer",
            "found LayerWiseDistributedOptimizer",
            "DistributedOptimizer",
            "whole params are dealt to ranks, which its own step gathers",
        )
    for setting, (found, reason) in _flags(optimizer).items():
        if found:
            raise _refusal(setting, "found true", "false", reason)
    config = optimizer.config
    if config.use_precision_aware_optimizer and config.main_params_dtype != torch.float32:
        raise _refusal(
            "megatron.optimizer.main_params_dtype",
            f"found {config.main_params_dtype}",
            "torch.float32",
            "lower precisions are scaled, and the scale changes with every edit",
        )
    stepper = getattr(optimizer, "optimizer", None)
    known = {kind.name for kind in KINDS}
    if config.optimizer not in known or (stepper and not all(map(kind_of, steppers(stepper)))):
        raise _refusal(
            "megatron.optimizer.optimizer",
            f"found {config.optimizer} ({type(stepper).__name__})",
            " or ".join(sorted(known)),
            "what it keeps beside the main params is not known to SFPO",
        )


def _flags(optimizer: MegatronOptimizer) -> dict[str, tuple[bool, str]]:
    """Setting -> (whether it is on, why SFPO cannot be with it)."""
    config = optimizer.config
    ddp_config = getattr(optimizer, "ddp_config", None)
    return {
        "megatron.ddp.use_megatron_fsdp": (
            getattr(ddp_config, "use_megatron_fsdp", False),
            "its param buffers are managed elsewhere",
        ),
        "megatron.ddp.fp8_param_gather": (
            getattr(ddp_config, "fp8_param_gather", False),
            "model params are quantized",
        ),
        "megatron.ddp.fp4_param_gather": (
            getattr(ddp_config, "fp4_param_gather", False),  # megatron-core 0.19
            "model params are quantized",
        ),
        "megatron.optimizer.reuse_grad_buf_for_mxfp8_param_ag": (
            config.reuse_grad_buf_for_mxfp8_param_ag,
            "gathered params share storage with gradients",
        ),
        "megatron.optimizer.overlap_param_gather_with_optimizer_step": (
            config.overlap_param_gather_with_optimizer_step,
            "the last fast step would gather what the reposition is about to overwrite",
        ),
        "megatron.optimizer.optimizer_cpu_offload with megatron.optimizer.optimizer: sgd": (
            config.optimizer_cpu_offload and config.optimizer == "sgd",
            "Megatron shards no SGD, and offloads shards only",
        ),
        "megatron.optimizer.optimizer_cpu_offload": (
            config.optimizer_cpu_offload and not isinstance(optimizer, DistributedOptimizer),
            "without the distributed optimizer Megatron replaces params that it has copied",
        ),
        "megatron.optimizer.use_precision_aware_optimizer": (
            config.use_precision_aware_optimizer and config.fp16,
            "of fp16 params its main params are not bound; set model.dtype: bfloat16",
        ),
    }


def _refusal(setting: str, found: str, expected: str, reason: str) -> ValueError:
    return ValueError(f"{setting}: {found}, expected {expected} with SFPO: {reason}")
