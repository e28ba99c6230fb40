"""What can go wrong between rank 0 and the engines; one message each, safe to send over Ray."""

from __future__ import annotations

from sfpo_megatron.errors import WrongInput


class RolloutError(RuntimeError):
    """Generation, scoring or a refit failed; the message says where and what to do."""


class CannotBeUsed(RolloutError, WrongInput):
    """A reward, an environment, an agent or a tool of the user's own cannot be used."""


class FleetLost(RolloutError):
    """Engines were restarted as often as rollout.max_restarts allows, or do not start again; the
    run cannot go on. Raised on every rank, outside of any collective: it can be saved."""


class EngineInterrupted(RolloutError):
    """An engine's update broke off through no fault of its own: it holds a mixture of weights."""


class ControllerDied(RolloutError):
    """The controller's process is gone or answers nothing; the client starts another."""


class EngineLost(Exception):
    """Inside the controller: the engine that was called is being replaced; ask another."""


class EngineCallFailed(RuntimeError):
    """Raised inside an engine actor when vLLM refused a call; the message is the worker's own."""


class UpdateInterrupted(EngineCallFailed):
    """Raised inside an engine actor whose update broke off through no fault of its own."""


class EngineDied(RuntimeError):
    """Raised inside an engine actor when vLLM's EngineCore or one of its workers is gone."""
