"""`MainParamShards`: this rank's fp32 main-param shards of whatever optimizer Megatron built.

shards = MainParamShards(optimizer)
for shard in shards.tensors(): ...   # edit in place, no communication
shards.publish()                     # main -> model params, then the param all-gather
shards.params_ready()                # before reading params outside a training forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sfpo_megatron.mcore.shards import steppers
from sfpo_megatron.mcore.shards.gathers import ParamGathers
from sfpo_megatron.mcore.shards.kinds import bind, members
from sfpo_megatron.mcore.shards.main_params import MainParams


class MainParamShards:
    """The seam between `sfpo.SlowSnapshot` and Megatron's optimizers.

    ValueError at construction for an optimizer whose main params cannot be edited safely, with the
    setting to change.

    defer_gathers: the caller promises `with shards.gathers_deferred(): optimizer.step()` and
    `ready_for_training()` before each training forward. Then an optimizer step or a `publish` only
    marks the all-gather as due, and the last fast step does not gather what the reposition is about
    to overwrite. Without it `publish` gathers at once, which is right in any training loop.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, defer_gathers: bool = False) -> None:
        self._optimizers = members(optimizer)
        self._members: list[MainParams] = [bind(member) for member in self._optimizers]
        distributed = [m for m in self._optimizers if isinstance(m, DistributedOptimizer)]
        self._gathers = ParamGathers(distributed, defer=defer_gathers)
        self.on_device = True
        """False: `mcore.offload` has moved everything to host memory; all use is refused."""

    def tensors(self) -> Iterator[Tensor]:
        """fp32, flat or in the param's shape. Edit or read one, on the current stream, before
        drawing the next: most are the optimizer's own storage, those of the precision-aware
        optimizer share one buffer, and are written back then.
        """
        self._require_on_device()
        for member in self._members:
            yield from member.tensors()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy main params into the model params and all-gather them over data-parallel ranks: at
        once, or, with `defer_gathers` or Megatron's `overlap_param_gather`, before the next
        training forward (`params_ready` does it sooner).

        Collective, in the order of the optimizers, their chunks and their buckets.
        """
        self._require_on_device()
        self._gathers.drain()
        for member in self._members:
            member.copy_to_model()
        self._gathers.after_edit()

    def take_from_model(self) -> None:
        """Inverse of `publish`, for weights that were loaded into the model: copy the model params,
        whole on every rank, into the main params."""
        self._require_on_device()
        for member in self._members:
            member.take_from_model()

    @torch.no_grad()
    def params_ready(self) -> None:
        """Finish every param all-gather that is still due: until then live params are 1/DP new and
        the rest old. Before anything but a training forward reads them. Collective."""
        self._require_on_device()
        self._gathers.finish()

    @torch.no_grad()
    def ready_for_training(self) -> None:
        """Before a training forward: `params_ready`, but with `overlap_param_gather` Megatron's own
        forward hooks gather, overlapped. Collective."""
        self._require_on_device()
        self._gathers.before_training_forward()

    @contextmanager
    def gathers_deferred(self) -> Iterator[None]:
        """Around `optimizer.step()`: it leaves its all-gather due instead of doing it."""
        with self._gathers.deferred():
            yield

    def before_step(self, callback: Callable[[], None]) -> None:
        """Call `callback` from now on once at the start of each optimizer step that is not skipped,
        before main params change."""
        for optimizer in self._optimizers[:1]:  # a ChainedOptimizer steps them in this order
            optimizer.optimizer.register_step_pre_hook(lambda *_: callback())

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(model param, optimizer's param group) that each of `tensors()` belongs to."""
        self._require_on_device()
        for member in self._members:
            yield from member.owners()

    def decays(self) -> list[float]:
        """Share of each of `tensors()` that an optimizer step takes off it beside its direction: lr
        x weight decay of AdamW; 0 where the decay is within the gradient, as SGD's is."""
        found = []
        for optimizer, member in zip(self._optimizers, self._members, strict=True):
            config = optimizer.config
            decoupled = config.optimizer == "adam" and config.decoupled_weight_decay
            for _, group in member.owners():
                found.append(group["lr"] * group["weight_decay"] if decoupled else 0.0)
        return found

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that the optimizers keep beside the model params; some share their memory,
        also with those."""
        for optimizer in self._optimizers:
            yield from steppers.storages(optimizer.optimizer)

    def _require_on_device(self) -> None:
        # Without this torch would read from address 0: an offloaded tensor's storage is empty.
        if not self.on_device:
            raise RuntimeError(
                "the trainer's weights are in host memory while engines have the device; "
                "bring them back first (mcore.offload.Offload.onload)"
            )

    def moments(self) -> Sequence[Tensor]:
        """Adam's exp_avg and exp_avg_sq of every main param; empty before the first step."""
        return [t for each in self._optimizers for t in steppers.moments(each.optimizer)]

    def step_counts(self) -> list[float]:
        """Adam's step counts, one a param (torch) or one a group (TE and Apex)."""
        return [c for each in self._optimizers for c in steppers.step_counts(each.optimizer)]

    def set_step_counts(self, counts: Sequence[float]) -> None:
        """Inverse of `step_counts`."""
        rest = list(counts)
        for optimizer in self._optimizers:
            rest = steppers.set_step_counts(optimizer.optimizer, rest)
        if rest:
            raise ValueError(f"{len(rest)} step counts too many for this optimizer")
