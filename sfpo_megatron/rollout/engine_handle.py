"""What the fleet keeps of one engine, and what it says of an engine's failure."""

from __future__ import annotations

from dataclasses import dataclass

from sfpo_megatron.rollout.errors import EngineCallFailed
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.lifeline import ActorProcesses
from sfpo_megatron.rollout.root_cause import EngineLog

NO_WEIGHTS = -1
"""The version of an engine that has slept, whose update was interrupted, or that was started after
an update."""


@dataclass(kw_only=True, slots=True, eq=False)
class EngineHandle:
    """One engine from its start to its end; its successor in the slot is another."""

    index: int
    actor: EngineActor
    log: EngineLog
    version: int
    """Version of the weights it holds. 0 is that of model.path, but where a run begins with other
    weights, which it is sent, they are 0."""
    processes: ActorProcesses | None = None
    ready: bool = False
    lost: bool = False
    gone: bool = False
    """Lost, and nothing of it is left on its devices."""
    asleep: bool = False
    interrupted: bool = False
    """Its last update broke off through no fault of its own: it holds a mixture of weights."""
    introduced: bool = False
    """It knows the trainer's sending end."""
    outstanding_tokens: int = 0
    num_calls: int = 0
    num_steps: int = 0
    """Steps that vLLM has made, when they were last counted."""
    last_progress: float = 0.0


def cause_of(error: Exception) -> str:
    """One line, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, EngineCallFailed):
        return str(cause)
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause) else ''}"
