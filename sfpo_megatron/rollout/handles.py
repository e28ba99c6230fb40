"""What Ray's handles of the controller and of an engine can be asked, as Protocols.

The methods are those of `controller.RolloutController` and `engine.Engine`; a test compares them.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import ParamSpec, Protocol, TypeVar

from sfpo_megatron.rollout.engine import Memory, WireInfo
from sfpo_megatron.rollout.lifeline import ActorProcesses
from sfpo_megatron.rollout.reports import EngineLoad, FleetHealth, FleetProgress, ScoredRequest
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings, RolloutRequest

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)


class Remote(Protocol[P, T_co]):
    """A method of an actor."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T_co]:
        """Begin a call; the answer can be awaited, or waited for with `ray.get`."""


class EngineActor(Protocol):
    """An engine in a process of its own."""

    start: Remote[[], None]
    processes: Remote[[], ActorProcesses]
    alive: Remote[[], bool]
    num_steps: Remote[[], int]
    take_load: Remote[[], EngineLoad]
    generate: Remote[
        [list[tuple[int, ...]], list[int], list[GenerationSettings]],
        list[Completion],
    ]
    init_weight_transfer_engine: Remote[[WireInfo], None]
    start_weight_update: Remote[[], None]
    update_weights: Remote[[WireInfo, int], None]
    finish_weight_update: Remote[[], None]
    sleep: Remote[[], None]
    wake: Remote[[Memory], None]
    shutdown: Remote[[], None]


class ControllerActor(Protocol):
    """The controller in a process of its own."""

    start: Remote[[], None]
    health: Remote[[], FleetHealth]
    progress: Remote[[str], FleetProgress]
    check: Remote[[], None]
    processes: Remote[[], tuple[str, list[ActorProcesses]]]
    shutdown: Remote[[], None]
    submit: Remote[[RolloutRequest], None]
    collect: Remote[[str], ScoredRequest | None]
    wait_generated: Remote[[str], None]
    sleep: Remote[[], None]
    wake: Remote[[Memory], None]
    needs_introduction: Remote[[bool], bool]
    num_participants: Remote[[bool], int]
    forget_introductions: Remote[[str | None], None]
    init_weight_transfer_engine: Remote[[WireInfo, bool], int]
    start_weight_update: Remote[[int, bool], None]
    update_weights: Remote[[WireInfo, int], None]
    finish_weight_update: Remote[[], None]
