"""Optimizer modes that SFPO refuses at setup: editing their main params would be silently wrong."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer


def refuse_unsupported(optimizer: MegatronOptimizer) -> None:
    """ValueError with the setting to change."""
    config = optimizer.config
    ddp_config = getattr(optimizer, "ddp_config", None)
    refused = {
        "megatron.optimizer.use_precision_aware_optimizer": (
            config.use_precision_aware_optimizer,
            "its main params are int16 remainders inside the fused optimizer",
        ),
        "megatron.optimizer.optimizer_cpu_offload": (
            config.optimizer_cpu_offload,
            "its CPU copies overwrite the shard at each step",
        ),
        "megatron.optimizer.reuse_grad_buf_for_mxfp8_param_ag": (
            config.reuse_grad_buf_for_mxfp8_param_ag,
            "gathered params share storage with gradients",
        ),
        "megatron.ddp.fp8_param_gather": (
            getattr(ddp_config, "fp8_param_gather", False),
            "model params are quantized",
        ),
        "megatron.ddp.use_megatron_fsdp": (
            getattr(ddp_config, "use_megatron_fsdp", False),
            "its param buffers are managed elsewhere",
        ),
    }
    for setting, (found, reason) in refused.items():
        if found:
            raise ValueError(f"{setting}: found true, expected false with SFPO: {reason}")
