"""What a model is told of a tool: its name, what it is for and its arguments, as JSON Schema.

Read by transformers from the function's signature and docstring; the config's settings are left
out.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sfpo_megatron.config.environments import ToolArgs
from sfpo_megatron.plugins import TOOL, Foreign, PluginError
from sfpo_megatron.tools import ToolError
from sfpo_megatron.types import Json

Schema: TypeAlias = dict[str, Json]


@dataclass(kw_only=True, frozen=True, slots=True)
class ToolChoice:
    """A tool of a run."""

    name: str
    """Built in, or `package.module:name`."""
    settings: Mapping[str, Json] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """What the model calls it."""
        return self.name.rpartition(":")[2]

    @property
    def is_persistent(self) -> bool:
        """Whether it is `python` in an interpreter that an episode keeps."""
        return self.name == "python" and self.settings.get("interpreter") == "persistent"

    @property
    def programs_bytes(self) -> int:
        """Memory that `python` is set to give a program; 0 where nothing is set."""
        memory_mib = self.settings.get("memory_mib") if self.name == "python" else None
        return memory_mib << 20 if isinstance(memory_mib, int) else 0

    def load(self, *, timeout_s: float = 0.0) -> BoundTool:
        """The tool with its settings; PluginError if it does not take them. `timeout_s`: the limit
        of a call, for a function that has a setting of this name and keeps it itself."""
        function: Callable[..., Foreign] = TOOL.load(self.name)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise PluginError(
                TOOL.key,
                found=f"{self.name}, which yields",
                expected="a function that returns its result, or an `async` one",
                fix="return the whole text",
            )
        tool = BoundTool(function, dict(self.settings))
        unknown = [name for name in self.settings if name not in tool.hidden]
        missing = [
            name
            for name, parameter in tool.hidden.items()
            if parameter.default is parameter.empty and name not in self.settings
        ]
        if unknown or missing:
            raise PluginError(
                f"rollout.environment_args.tool_args.{self.called}",
                found=", ".join(unknown) or f"no {missing[0]}",
                expected=f"its settings: {', '.join(tool.hidden) or 'none'}",
                fix="remove them" if unknown else f"set {missing[0]}",
            )
        if timeout_s and "timeout_s" in tool.hidden:
            tool.settings.setdefault("timeout_s", timeout_s)
        return tool


class BoundTool:
    """A tool with its settings, to be called with what a model gives."""

    def __init__(self, function: Callable[..., Foreign], settings: dict[str, Json]) -> None:
        self.function, self.settings = function, settings
        parameters = inspect.signature(function).parameters
        self.hidden = {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        self._shown = {k: p for k, p in parameters.items() if k not in self.hidden}

    def warm_up(self) -> None:
        """Call the `warm_up` of its module, if it has one, with its settings."""
        warm_up = getattr(sys.modules[self.function.__module__], "warm_up", None)
        if callable(warm_up):
            warm_up(**self.settings)

    def call(self, arguments: Mapping[str, Json]) -> str:
        """The result as text; ToolError for arguments that are not its own, or what it raises."""
        unknown = [name for name in arguments if name not in self._shown]
        missing = [
            name
            for name, parameter in self._shown.items()
            if parameter.default is parameter.empty and name not in arguments
        ]
        if unknown or missing:
            what = f"unknown argument {unknown[0]!r}" if unknown else f"no argument {missing[0]!r}"
            raise ToolError(f"{what}; the arguments are: {', '.join(self._shown) or 'none'}")
        result = self.function(**arguments, **self.settings)
        if inspect.isawaitable(result):
            result = asyncio.run(_waited(result))
        return "" if result is None else str(result)


async def _waited(result: Awaitable[Foreign]) -> Foreign:
    return await result


def choices_of(args: ToolArgs) -> tuple[ToolChoice, ...]:
    """The tools of an environment, with their settings."""
    called = (name.rpartition(":")[2] for name in args.tools)
    return tuple(
        ToolChoice(name=name, settings=args.tool_args.get(short, {}))
        for name, short in zip(args.tools, called, strict=True)
    )


def schemas_of(choices: Sequence[ToolChoice]) -> list[Schema]:
    """What a chat template gets as `tools`; PluginError for a function that does not say enough."""
    return [_schema(choice) for choice in choices]


def _schema(choice: ToolChoice) -> Schema:
    from transformers.utils import get_json_schema

    tool = choice.load()
    try:
        schema = get_json_schema(tool.function)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException: not public
        raise PluginError(
            TOOL.key,
            found=f"{choice.name}, of which a model cannot be told ({error})",
            expected="a type for each parameter, and a docstring with a line for each under Args:",
            fix="add them",
        ) from error
    function = schema["function"]
    parameters = function["parameters"]
    properties = {k: v for k, v in parameters["properties"].items() if k not in tool.hidden}
    required = [name for name in parameters.get("required", ()) if name not in tool.hidden]
    # The return value's description is none of OpenAI's format, and changes what templates write.
    told: dict[str, Json] = {k: v for k, v in function.items() if k != "return"}
    if choice.is_persistent:
        told["description"] = f"{told['description']} Variables are kept from call to call."
    shown: dict[str, Json] = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {**told, "parameters": shown}}
