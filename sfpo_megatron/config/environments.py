"""The settings of the built-in environments: what `rollout.environment_args` may hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeAlias

from sfpo_megatron.config.fields import (
    MOST_PROCESSES,
    FieldError,
    at_least,
    first_repeated,
    known,
    positive,
    within,
)
from sfpo_megatron.config.origin import Source
from sfpo_megatron.config.rollout import RolloutConfig
from sfpo_megatron.config.typed import build
from sfpo_megatron.plugins import ENVIRONMENT, TOOL

MATH_TOOL = "math_tool"
CallFormat: TypeAlias = Literal["hermes", "llama"]


@dataclass(kw_only=True, frozen=True, slots=True)
class ToolArgs:
    """Settings of math_tool, and of an environment of your own that is made of it."""

    tools: tuple[Annotated[str, TOOL], ...] = ("calculator",)
    """Tools that the model may call, which the prompts tell it: calculator, python, search, or
    functions of your own."""
    tool_args: dict[str, Any] = field(default_factory=dict)
    """Settings of tools, by their names: {search: {path: FILE}}."""
    call_format: CallFormat = "hermes"
    """hermes: <tool_call>{"name": ..., "arguments": {...}}</tool_call> (Qwen, Hermes); llama: the
    turn is {"name": ..., "parameters": {...}} (Llama 3)."""
    max_turns: int = 4
    """Turns of the model, at most."""
    max_result_chars: int = 2000
    """What of a tool's result is told to the model."""
    timeout_s: float = 5.0
    """What a call may take; then its process is replaced, and the model is told."""
    num_workers: int = 2
    """Processes that tools run in."""

    def __post_init__(self) -> None:
        known(self, TOOL, "tools")
        at_least(self, 1, "max_turns", "max_result_chars")
        within(self, 1, MOST_PROCESSES, "num_workers")
        positive(self, "timeout_s")
        called = [name.rpartition(":")[2] for name in self.tools]
        if (twice := first_repeated(called)) is not None:
            raise FieldError("tools", list(self.tools), "each name once", f"remove one {twice}")
        for name, settings in self.tool_args.items():
            if name not in called:
                raise FieldError(
                    f"tool_args.{name}", settings, f"one of {', '.join(called)}", "correct the name"
                )
            if not isinstance(settings, dict):
                raise FieldError(
                    f"tool_args.{name}", settings, "a section of keys", "give its settings by name"
                )


KEY = "rollout.environment_args"


def tool_args(environment_args: Mapping[str, Any], source: str = "config") -> ToolArgs:
    """The settings, checked; ConfigError for what is none. `source`: what the error names."""
    tree = {k: list(v) if isinstance(v, tuple) else v for k, v in environment_args.items()}
    return build(ToolArgs, tree, KEY, Source(file=source))


def told_tools(rollout: RolloutConfig) -> ToolArgs | None:
    """The settings of the tools that prompts tell of; None where there are none: those of
    math_tool, and of an environment of your own that has `tools` among its settings."""
    is_own = rollout.environment not in ENVIRONMENT.built_in
    if rollout.environment != MATH_TOOL and not (is_own and "tools" in rollout.environment_args):
        return None
    names = {field.name for field in fields(ToolArgs)}
    given = rollout.environment_args.items()
    return tool_args({k: v for k, v in given if k in names} if is_own else dict(given))
