"""The settings of environments that a program of the user's own plays through the rollout endpoint.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from sfpo_megatron.config.environments import KEY, CallFormat
from sfpo_megatron.config.fields import at_least, known, positive
from sfpo_megatron.config.origin import Source
from sfpo_megatron.config.typed import build
from sfpo_megatron.plugins import AGENT

AGENT_ENVIRONMENT = "agent"
Args = TypeVar("Args", bound="EndpointArgs")


@dataclass(kw_only=True, frozen=True, slots=True)
class EndpointArgs:
    """Settings of every environment that is played through the endpoint."""

    call_format: CallFormat = "hermes"
    """How the model writes tool calls, as math_tool's call_format."""
    timeout_s: float = 1800.0
    """What an episode may take, the wait for engines included."""
    max_request_bytes: int = 8388608
    """A larger request is refused."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")
        at_least(self, 1024, "max_request_bytes")


@dataclass(kw_only=True, frozen=True, slots=True)
class AgentArgs(EndpointArgs):
    """Settings of `rollout.environment: agent`."""

    agent: Annotated[str, AGENT]
    """The program, an `async def` as package.module:function."""
    agent_args: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of it, which have defaults."""

    def __post_init__(self) -> None:
        EndpointArgs.__post_init__(self)
        known(self, AGENT, "agent")


@dataclass(kw_only=True, frozen=True, slots=True)
class VerifiersArgs(EndpointArgs):
    """Settings of `rollout.environment: verifiers:NAME`."""

    env: dict[str, Any] = field(default_factory=dict)
    """The package's own `env` section, without the name: {agent: {harness: {id: "null"}, runtime:
    {type: subprocess}}}."""


def agent_args(environment_args: Mapping[str, Any]) -> AgentArgs:
    """The settings, checked; ConfigError for what is none."""
    return _built(AgentArgs, environment_args)


def verifiers_args(environment_args: Mapping[str, Any]) -> VerifiersArgs:
    """The settings, checked; ConfigError for what is none."""
    return _built(VerifiersArgs, environment_args)


def _built(kind: type[Args], environment_args: Mapping[str, Any]) -> Args:
    tree = {k: list(v) if isinstance(v, tuple) else v for k, v in environment_args.items()}
    return build(kind, tree, KEY, Source(file="config"))
