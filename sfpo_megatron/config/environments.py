"""The settings of the built-in environments: what `rollout.environment_args` may hold. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from sfpo_megatron.config.fields import FieldError, at_least, known, positive
from sfpo_megatron.plugins import TOOL

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
        at_least(self, 1, "max_turns", "max_result_chars", "num_workers")
        positive(self, "timeout_s")
        called = [name.rpartition(":")[2] for name in self.tools]
        twice = [name for name in called if called.count(name) > 1]
        if twice:
            raise FieldError("tools", list(self.tools), "each name once", f"remove one {twice[0]}")
        for name, settings in self.tool_args.items():
            if name not in called:
                raise FieldError(
                    f"tool_args.{name}", settings, f"one of {', '.join(called)}", "correct the name"
                )
            if not isinstance(settings, dict):
                raise FieldError(
                    f"tool_args.{name}", settings, "a section of keys", "give its settings by name"
                )
