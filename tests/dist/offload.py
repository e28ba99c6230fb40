"""Make HybridDeviceOptimizer offload on a machine without a GPU.

It sorts params by `param.is_cuda` and makes host copies by `.cpu().pin_memory()`; on a CPU none is
offloaded. `offloading()` answers these calls, inside its `_get_sub_optimizer_param_groups` alone,
as a GPU would: every tensor is on the device but copies made by `.cpu()` and what is made of those.
Everything after that (sub-optimizers, hooks, copies) is Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_HOST = "_is_on_host"


def _to_host(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    setattr(copy, _HOST, True)
    return copy


def _keeping_the_place(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = original(tensor, *args, **kwargs)
        setattr(result, _HOST, getattr(tensor, _HOST, False))
        return result

    return call


@contextmanager
def _a_gpu() -> Iterator[None]:
    from unittest.mock import patch

    with (
        patch.object(Tensor, "is_cuda", property(lambda t: not getattr(t, _HOST, False))),
        patch.object(Tensor, "cpu", _to_host),
        patch.object(Tensor, "pin_memory", lambda t: t),
        patch.object(Tensor, "clone", _keeping_the_place(Tensor.clone)),
        patch.object(Tensor, "detach", _keeping_the_place(Tensor.detach)),
        patch.object(Tensor, "float", _keeping_the_place(Tensor.float)),
    ):
        yield


@contextmanager
def offloading() -> Iterator[None]:
    """HybridDeviceOptimizers built inside offload their fraction of the params."""
    from unittest.mock import patch

    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    original = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def on_a_gpu(self: Any, offload_fraction: float) -> Any:
        with _a_gpu():
            return original(self, offload_fraction)

    with patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", on_a_gpu):
        yield
