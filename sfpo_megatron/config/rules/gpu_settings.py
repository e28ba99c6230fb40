"""What a GPU would do faster, where a config leaves a setting at the default that a CPU needs.

Warnings only, and only of what is not set: whoever sets a value means it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sfpo_megatron.config.rollout import RolloutConfig
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

_SHARE = next(
    f.default for f in dataclasses.fields(RolloutConfig) if f.name == "gpu_memory_utilization"
)


def gpu_settings(config: RunConfig, on_cpu: bool) -> Iterator[Problem]:
    """Warn of defaults that are slow or waste memory on CUDA."""
    if on_cpu:
        return
    if config.model.dtype == "float32":
        # TransformerEngine and vLLM have fused attention for 16 bits only (utils.py,
        # `get_attention_backend`; vllm/v1/attention/backends/flash_attn.py, `supported_dtypes`).
        yield Problem(
            "model.dtype",
            "float32 on a GPU",
            "bfloat16",
            "set model.dtype: bfloat16: attention in fp32 has no fused kernel, in the trainer nor "
            "in the engines",
            "warning",
        )
    rollout, has_engines = config.rollout, config.debug.train_only is None
    is_default = rollout.gpu_memory_utilization == _SHARE
    if has_engines and rollout.placement == "dedicated" and is_default:
        yield Problem(
            "rollout.gpu_memory_utilization",
            f"{_SHARE:g}, the default, with dedicated engines",
            "about 0.9",
            "set it: the rest of their GPUs stays empty, and fewer sequences fit at a time",
            "warning",
        )
    yield from _overlaps(config)


def _overlaps(config: RunConfig) -> Iterator[Problem]:
    """Gradients and params that travel while layers compute (DistributedDataParallelConfig)."""
    parallel, settings = config.parallel, config.megatron.ddp
    if (parallel.data, parallel.context) == (1, 1):
        return
    wanted = ["overlap_grad_reduce"]
    if settings.get("use_distributed_optimizer", True):
        wanted.append("overlap_param_gather")
    for name in wanted:
        if name not in settings:
            yield Problem(
                f"megatron.ddp.{name}",
                "nothing, on GPUs with data parallelism",
                "true",
                f"set megatron.ddp.{name}=true: each optimizer step waits for it otherwise",
                "warning",
            )
