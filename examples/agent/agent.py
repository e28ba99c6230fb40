"""An agent of one's own: the openai client, a tool, and a limit of turns.

Nothing here knows of a trainer: any program that speaks the OpenAI protocol can be in its place.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from openai import AsyncOpenAI

from sfpo_megatron.tools import ToolError
from sfpo_megatron.tools.calculator import calculator
from sfpo_megatron.types import Prompt

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate the value of an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


async def solve(
    base_url: str, api_key: str, prompt: Prompt, seed: int, *, max_turns: int = 3
) -> float | None:
    """None: reward.function scores the model's last turn."""
    policy = client_of(base_url).with_options(api_key=api_key)
    messages: list[Any] = [{"role": "user", "content": prompt.question}]
    for _ in range(max_turns):
        answer = await policy.chat.completions.create(
            model="policy", messages=messages, tools=[CALCULATOR]
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            return None
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": result(call.function.arguments)}
            for call in message.tool_calls
        ]
        messages += [message, *results]
    return 0.0  # it never answered


def result(arguments: str) -> str:
    """What the model is told of a call, whatever it has called and how."""
    try:
        return calculator(str(json.loads(arguments)["expression"]))
    except (KeyError, ToolError) as error:
        return f"error: {error}"


@cache
def client_of(base_url: str) -> AsyncOpenAI:
    """One for all episodes: each has its own key."""
    return AsyncOpenAI(base_url=base_url, api_key="set for each episode")
