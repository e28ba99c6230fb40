"""Rules of check.py about the environment and its tools. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sfpo_megatron.config.environments import KEY, MATH_TOOL, ToolArgs, told_tools
from sfpo_megatron.config.origin import ConfigError
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import TOOL, PluginError


def environment(config: RunConfig) -> Iterator[Problem]:
    """Its settings are known, its tools are there, and prompts tell of them."""
    rollout = config.rollout
    if rollout.environment == "single_turn" and rollout.environment_args:
        yield Problem(
            KEY,
            ", ".join(rollout.environment_args),
            "nothing with environment single_turn",
            "remove it, or set rollout.environment",
        )
    try:
        told = told_tools(rollout)
    except ConfigError as error:
        yield Problem(error.key, error.found, error.expected, error.fix)
        return
    if told is None:
        return
    yield from _tools(told)
    if rollout.environment == MATH_TOOL and not config.data.chat_template:
        yield Problem(
            "data.chat_template",
            "false with rollout.environment math_tool",
            "true: the chat template writes the turns and tells the model of its tools",
            "set it",
        )


def _tools(told: ToolArgs) -> Iterator[Problem]:
    for index, name in enumerate(told.tools):
        try:
            TOOL.find(name, key=f"{KEY}.tools.{index}")
        except PluginError as error:
            yield Problem(error.key, error.found, error.expected, error.fix)
    if "search" in told.tools:
        path = told.tool_args.get("search", {}).get("path")
        if not isinstance(path, str) or not os.path.isfile(path):
            yield Problem(
                f"{KEY}.tool_args.search.path",
                "nothing" if path is None else f"{path!r}, which is no file",
                "a file of text, or jsonl with a text in each line",
                "name the file that the tool searches",
            )
