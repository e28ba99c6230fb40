"""Whose the shared devices are: the trainer's or the colocated engines', one at a time.

    engines start, sleep        before Megatron takes any memory: vLLM measures what is free
    loop:
        wake weights, refit, offload, wake caches       to_engines
        generate, evaluate
        sleep, onload                                   to_trainer
        log-probs, passes, checkpoints

Engines sleep without a copy of their weights, so each of their turns begins with a refit. On CPU
vLLM has no sleep mode: engines stay awake, and everything else is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.offload import Offload


class Turns:
    """Begins with the trainer's turn, engines asleep. Methods are collective."""

    def __init__(
        self, offload: Offload, control: ControlGroup, tell_engines: Callable[..., None]
    ) -> None:
        """`tell_engines(method, *arguments)` of `RolloutClient`; collective."""
        self._offload = offload
        self._control = control
        self._tell_engines = tell_engines
        self.times: dict[str, float] = {}
        """Seconds of this rank's last moves, for the metrics."""

    @property
    def is_engines(self) -> bool:
        return self._offload.is_offloaded

    def to_trainer(self) -> None:
        """Engines sleep, then the trainer's state comes back."""
        if self.is_engines:
            begun = time.monotonic()
            self._tell_engines("sleep")
            self._offload.onload()
            self.times["time/onload_s"] = time.monotonic() - begun

    @contextmanager
    def to_engines(self) -> Iterator[None]:
        """Around the refit that brings their weights."""
        self._offload.free_cache()
        self._control.barrier()  # an engine may share the devices of several ranks
        self._tell_engines("wake", "weights")
        yield
        begun = time.monotonic()
        self._offload.offload()
        self._control.barrier()
        self._tell_engines("wake", "kv_cache")
        self.times["time/offload_s"] = time.monotonic() - begun

    def end_engines(self, close: Callable[[], None]) -> None:
        """For good, whatever state they are in: `close` ends them."""
        if self.is_engines:
            close()
            self._control.barrier()
            self._offload.onload()
