"""The settings of environments that a program of the user's own plays through the rollout endpoint.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from sfpo_megatron.config.environments import KEY, CallFormat
from sfpo_megatron.config.fields import at_least, known, positive
from sfpo_megatron.config.origin import Source
from sfpo_megatron.config.typed import build
from sfpo_megatron.plugins import AGENT

AGENT_ENVIRONMENT = "agent"


@dataclass(kw_only=True, frozen=True, slots=True)
class AgentArgs:
    """Settings of `rollout.environment: agent`."""

    agent: Annotated[str, AGENT]
    """The program, an `async def` as package.module:function."""
    agent_args: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of it."""
    call_format: CallFormat = "hermes"
    """How the model writes tool calls, as math_tool's call_format."""
    timeout_s: float = 1800.0
    """What an episode may take, the wait for engines included."""
    max_request_bytes: int = 8388608
    """A larger request is refused."""

    def __post_init__(self) -> None:
        known(self, AGENT, "agent")
        positive(self, "timeout_s")
        at_least(self, 1024, "max_request_bytes")


def agent_args(environment_args: Mapping[str, Any], source: str = "config") -> AgentArgs:
    """The settings, checked; ConfigError for what is none. `source`: what the error names."""
    tree = {k: list(v) if isinstance(v, tuple) else v for k, v in environment_args.items()}
    return cast(AgentArgs, build(AgentArgs, tree, KEY, Source(file=source)))
