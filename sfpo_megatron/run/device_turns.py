"""Turns on shared devices: they are the trainer's or the colocated engines', never both.

    engines start, sleep        before Megatron takes any memory: vLLM measures what is free
    loop:
        drop gradients, wake weights, refit, offload, wake caches       to_engines
        generate, evaluate
        sleep, onload                                                   to_trainer
        log-probs, passes, checkpoints

Engines sleep without a copy of their weights, so each of their turns begins with a refit. On CPU
vLLM has no sleep mode: engines stay awake, and everything else is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.offload import Offload

if TYPE_CHECKING:
    from sfpo_megatron.rollout.engine import Memory


class DeviceTurns(Protocol):
    """Who may use the devices now. Methods are collective."""

    @property
    def is_engines(self) -> bool:
        """Whether engines can be asked for something."""

    @property
    def times(self) -> Mapping[str, float]:
        """Seconds of this rank's last moves, for the metrics."""

    def to_trainer(self) -> None:
        """Give the devices to the trainer, before its weights are used."""

    def to_engines(self) -> AbstractContextManager[None]:
        """Give the devices to the engines, around the refit that brings their weights."""

    def end_engines(self, close: Callable[[], None]) -> None:
        """Give the devices to the trainer for good; `close` ends the engines."""


class NoTurns:
    """Dedicated engines have devices of their own."""

    is_engines = True
    times: Mapping[str, float] = {}

    def to_trainer(self) -> None:
        """Nothing has to be moved."""

    def to_engines(self) -> AbstractContextManager[None]:
        """Nothing has to be moved."""
        return nullcontext()

    def end_engines(self, close: Callable[[], None]) -> None:
        """The engines may live on: nothing waits for their devices."""


class Turns:
    """Begins with the trainer's turn, engines asleep."""

    def __init__(
        self,
        offload: Offload,
        control: ControlGroup,
        *,
        sleep: Callable[[], None],
        wake: Callable[[Memory], None],
    ) -> None:
        """`sleep()` and `wake(memory)` reach every engine; collective."""
        self._offload = offload
        self._control = control
        self._sleep = sleep
        self._wake = wake
        self.times: dict[str, float] = {}

    @property
    def is_engines(self) -> bool:
        return self._offload.is_offloaded

    def to_trainer(self) -> None:
        """Engines sleep, then the trainer's state comes back."""
        if self.is_engines:
            begun = time.monotonic()
            self._sleep()
            self._offload.onload()
            self.times["time/onload_s"] = time.monotonic() - begun

    @contextmanager
    def to_engines(self) -> Iterator[None]:
        """Engines wake for the refit inside, then the trainer's state leaves the devices."""
        self._offload.make_room()
        self._control.barrier()  # an engine may share the devices of several ranks
        self._wake("weights")
        yield
        begun = time.monotonic()
        self._offload.offload()
        self._control.barrier()
        self._wake("kv_cache")
        self.times["time/offload_s"] = time.monotonic() - begun

    def end_engines(self, close: Callable[[], None]) -> None:
        """End the engines whatever state they are in, and take the devices back."""
        if self.is_engines:
            close()
            self._control.barrier()
            self._offload.onload()
