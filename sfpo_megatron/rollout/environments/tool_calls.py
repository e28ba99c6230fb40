"""Tool calls in a model's turn, in the two formats that open models write.

hermes  <tool_call>{"name": "search", "arguments": {"query": "zebra"}}</tool_call>, any number
llama   the turn is {"name": "search", "parameters": {"query": "zebra"}}, several after a ;
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from sfpo_megatron.config.environments import CallFormat
from sfpo_megatron.data.strict_json import STRICT, read_strict, require_shallow
from sfpo_megatron.data.values import is_text
from sfpo_megatron.types import Json

_HERMES = re.compile(r"<tool_call>(.*?)(?P<end></tool_call>|\Z)", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_THOUGHT_END = "</think>"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(kw_only=True, frozen=True, slots=True)
class ToolCall:
    """A call that can be made."""

    name: str
    arguments: dict[str, Json]


@dataclass(kw_only=True, frozen=True, slots=True)
class BadCall:
    """One that cannot: why, for the model."""

    why: str


Call: TypeAlias = ToolCall | BadCall


def calls_in(turn: str, call_format: CallFormat) -> list[Call]:
    """The calls of a turn, in order; none for an answer. What is thought is no call."""
    if "<think>" in turn and _THOUGHT_END not in turn:
        return []
    said = turn.rpartition(_THOUGHT_END)[2]
    return _hermes(said) if call_format == "hermes" else _llama(said)


def _hermes(text: str) -> list[Call]:
    return [
        _call(match[1]) if match["end"] else BadCall(why="the tool call has no </tool_call>")
        for match in _HERMES.finditer(text)
    ]


def _llama(text: str) -> list[Call]:
    said = text.strip().removeprefix(_PYTHON_TAG).strip()
    is_call = text.strip().startswith(_PYTHON_TAG) or (said.startswith("{") and '"name"' in said)
    if not is_call:
        return []
    calls: list[Call] = []
    while said:
        try:
            value, end = STRICT.raw_decode(said)
            require_shallow(value)
        except (ValueError, RecursionError) as error:
            return [*calls, _not_json(error)]
        calls.append(_checked(value))
        said = said[end:].lstrip().removeprefix(";").lstrip()
    return calls


def _call(text: str) -> Call:
    try:
        return _checked(read_strict(text))
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _not_json(error: Exception) -> BadCall:
    return BadCall(why=f"the tool call is not JSON: {error}")


def _checked(value: Json) -> Call:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str) or not is_text(name):
        return BadCall(why='the tool call has no "name"')
    given: Json = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(given, str):  # some models write them as text
        try:
            given = read_strict(given)
        except (ValueError, RecursionError) as error:
            return BadCall(why=f"the arguments of the tool call are not JSON: {error}")
    if not isinstance(given, dict):
        return BadCall(why="the arguments of the tool call are no JSON object")
    return ToolCall(name=name, arguments=given)
