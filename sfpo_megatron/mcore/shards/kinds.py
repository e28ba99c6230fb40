"""Which binding an optimizer of Megatron's takes."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from sfpo_megatron.mcore.shards.distributed import DistributedMainParams
from sfpo_megatron.mcore.shards.hybrid import HybridMainParams
from sfpo_megatron.mcore.shards.main_params import MainParams
from sfpo_megatron.mcore.shards.precision_aware import PrecisionAwareMainParams
from sfpo_megatron.mcore.shards.refused import refuse_unsupported
from sfpo_megatron.mcore.shards.undistributed import Float16MainParams, FP32MainParams

KINDS: tuple[type[MainParams], ...] = (
    HybridMainParams,
    PrecisionAwareMainParams,
    DistributedMainParams,
    Float16MainParams,
    FP32MainParams,
)
"""The first that fits is taken."""


def members(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of this rank that have params: one without trainable params of a kind (a
    pipeline stage without experts) has a stub."""
    chained = isinstance(optimizer, ChainedOptimizer)
    if chained and not isinstance(optimizer, LayerWiseDistributedOptimizer):
        found = list(optimizer.chained_optimizers)
    else:
        found = [optimizer]
    return [member for member in found if not getattr(member, "is_stub_optimizer", False)]


def bind(optimizer: MegatronOptimizer) -> MainParams:
    """The binding for `optimizer`; ValueError names a setting or a class that none fits."""
    refuse_unsupported(optimizer)
    for kind in KINDS:
        if kind.fits(optimizer):
            return kind(optimizer)
    raise ValueError(
        f"optimizer: found {type(optimizer).__name__}, expected DistributedOptimizer, "
        "Float16OptimizerWithFloat16Params or FP32Optimizer; SFPO cannot edit its main params"
    )
