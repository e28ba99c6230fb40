"""One binding for each kind of optimizer that Megatron builds: its fp32 main params, editable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from sfpo_megatron.mcore.shards.hybrid import HybridMainParams
from sfpo_megatron.mcore.shards.precision_aware import PrecisionAwareMainParams
from sfpo_megatron.mcore.shards.refused import refuse_unsupported


class MainParams(Protocol):
    """What `MainParamShards` needs of one optimizer (a member of a ChainedOptimizer)."""

    def tensors(self) -> Iterator[Tensor]:
        """fp32 main params of this rank; edits before the next is drawn count."""

    def copy_to_model(self) -> None:
        """Main params into this rank's part of the model params. No communication."""


@dataclass(frozen=True, slots=True)
class DistributedMainParams:
    """DistributedOptimizer: flat fp32 shards of bf16 or fp16 params; of fp32 params, views of the
    model params' own storage."""

    optimizer: DistributedOptimizer

    def tensors(self) -> Iterator[Tensor]:
        for group in (
            *self.optimizer.shard_fp32_from_float16_groups,
            *self.optimizer.shard_fp32_groups,
        ):
            yield from group

    def copy_to_model(self) -> None:
        self.optimizer._copy_main_params_to_model_params()


@dataclass(frozen=True, slots=True)
class Float16MainParams:
    """Float16OptimizerWithFloat16Params: every data-parallel rank holds all main params."""

    optimizer: Float16OptimizerWithFloat16Params

    def tensors(self) -> Iterator[Tensor]:
        """fp32 masters of bf16 or fp16 params, then params that are fp32 themselves."""
        for group in (
            *self.optimizer.fp32_from_float16_groups,
            *self.optimizer.fp32_from_fp32_groups,
        ):
            yield from group

    def copy_to_model(self) -> None:
        self.optimizer._copy_main_params_to_model_params()


@dataclass(frozen=True, slots=True)
class FP32MainParams:
    """FP32Optimizer: the model params are their own main params."""

    optimizer: FP32Optimizer

    def tensors(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def copy_to_model(self) -> None:
        pass


def bind(optimizer: MegatronOptimizer) -> MainParams:
    """The binding for `optimizer`; ValueError names a setting or a class that none fits."""
    refuse_unsupported(optimizer)
    if isinstance(optimizer, DistributedOptimizer):
        if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
            return HybridMainParams(optimizer)
        # False with an FP8 recipe other than delayed: Megatron holds the main params then.
        if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            return PrecisionAwareMainParams(optimizer)
        return DistributedMainParams(optimizer)
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        return Float16MainParams(optimizer)
    if isinstance(optimizer, FP32Optimizer):
        return FP32MainParams(optimizer)
    raise ValueError(
        f"optimizer: found {type(optimizer).__name__}, expected DistributedOptimizer, "
        "Float16OptimizerWithFloat16Params or FP32Optimizer; SFPO cannot edit its main params"
    )
