"""When the DistributedOptimizer's param all-gathers run, and that none is forgotten or done twice.

A param all-gather follows each optimizer step: at once, or with `overlap_param_gather` from forward
pre-hooks during the next training forward. SFPO edits the main params after the last fast step, so
a gather there would be overwritten; `deferred` leaves it due, as the overlapped one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

T = TypeVar("T")


class BucketGroup(Protocol):
    """What is used of Megatron's bucket groups (param_and_grad_buffer.py)."""

    ddp_config: DistributedDataParallelConfig
    param_gather_handle: dist.Work | None
    param_gather_dispatched: bool

    def start_param_sync(self, force_sync: bool = False) -> None: ...


class ParamGathers:
    """The gathers of all bucket groups of these optimizers. Each method that gathers is collective:
    every rank calls it, in the order of chunks and bucket groups."""

    def __init__(self, optimizers: Sequence[DistributedOptimizer], *, defer: bool) -> None:
        self._groups = list(_bucket_groups(optimizers))
        self._ddp_configs = _distinct([group.ddp_config for group in self._groups])
        self._overlap = any(config.overlap_param_gather for config in self._ddp_configs)
        self._defer = defer
        self._due = False  # without overlap; with it, each group's own flag says so

    def drain(self) -> None:
        """Wait for outstanding gathers. `start_param_sync(force_sync=True)` would return after such
        a wait WITHOUT gathering (param_and_grad_buffer.py), leaving params from before the edit."""
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None

    def after_edit(self) -> None:
        """Model params of this rank's shard have changed: gather now, or mark it as due."""
        if self._overlap:
            for group in self._groups:
                group.param_gather_dispatched = False  # the next training forward's hooks gather
        elif self._defer:
            self._due = True
        else:
            self._gather(self._groups)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """`optimizer.step()` inside does not gather: it reads `ddp_config.overlap_param_gather`
        (distrib_optimizer.py, step_with_ready_grads) and takes the hooks for granted."""
        if not self._overlap:
            for config in self._ddp_configs:
                config.overlap_param_gather = True
        try:
            yield
        finally:
            if not self._overlap:
                for config in self._ddp_configs:
                    config.overlap_param_gather = False
                self._due = True

    def finish(self) -> None:
        """Gather what is due, now, and leave nothing outstanding."""
        self.drain()
        if self._overlap:
            # Upstream resets the flag at the end of each backward, before the optimizer step.
            self._gather([group for group in self._groups if not group.param_gather_dispatched])
        elif self._due:
            self._gather(self._groups)

    def before_training_forward(self) -> None:
        if not self._overlap:
            self.finish()

    def _gather(self, groups: Sequence[BucketGroup]) -> None:
        for group in groups:
            assert group.param_gather_handle is None, "drain() first"
            group.start_param_sync(force_sync=True)
            assert group.param_gather_handle is None
        self._due = False


def _bucket_groups(
    optimizers: Sequence[DistributedOptimizer],
) -> Iterator[BucketGroup]:
    """The groups of every chunk, once: dense and expert optimizers share the chunks."""
    for chunk in _distinct([chunk for optimizer in optimizers for chunk in optimizer.model_chunks]):
        yield from chunk.bucket_groups
        yield from chunk.expert_parallel_bucket_groups


def _distinct(objects: Sequence[T]) -> list[T]:
    return list({id(each): each for each in objects}.values())
