"""The model calls tools and is told their results, until a turn calls none: that is the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sfpo_megatron.config.environments import tool_args
from sfpo_megatron.data.turns import Message
from sfpo_megatron.rollout.environments.conversation import Conversation, Told
from sfpo_megatron.rollout.environments.tool_calls import BadCall, Call, calls_in
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.tools.declared import choices_of, schemas_of
from sfpo_megatron.tools.pool import ToolPool, ToolResult
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ToolEnvironment(Conversation):
    """`math_tool`, and the base of environments with tools of your own."""

    role: ClassVar[str] = "tool"
    counted: ClassVar[tuple[str, ...]] = ("tool_calls", "tool_errors")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_args: Mapping[str, Any] | None = None,
        **environment_args: Any,
    ) -> None:
        """`environment_args`: the fields of `config.environments.ToolArgs`. Starts the tools'
        processes; `close` ends them."""
        self.args = tool_args(environment_args)
        choices = choices_of(self.args)
        variables = {"tools": schemas_of(choices), **(chat_template_args or {})}
        super().__init__(tokenizer, chat_template_args=variables, max_turns=self.args.max_turns)
        self._tools = ToolPool(
            choices,
            timeout_s=self.args.timeout_s,
            num_workers=self.args.num_workers,
        )

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One rollout."""
        with self._tools.episode():
            return await super().run(prompt, generate, seed)

    async def respond(self, prompt: Prompt, turns: Sequence[str]) -> Told:
        """The results of the last turn's calls, in their order."""
        calls = self.calls_in(turns[-1])
        results = await asyncio.gather(*map(self.call, calls))
        pairs = zip(calls, results, strict=True)
        return Told(
            messages=[self._message(call, result) for call, result in pairs],
            counts={
                "tool_calls": len(calls),
                "tool_errors": sum(result.failed for result in results),
            },
        )

    def calls_in(self, turn: str) -> list[Call]:
        """The tool calls of a turn; none for an answer."""
        return calls_in(turn, self.args.call_format)

    async def call(self, call: Call) -> ToolResult:
        """The result of one call."""
        if isinstance(call, BadCall):
            return ToolResult(text=call.why, failed=True)
        return await self._tools.call(call.name, call.arguments)

    def close(self) -> None:
        """End the tools' processes."""
        self._tools.close()

    def _message(self, call: Call, result: ToolResult) -> Message:
        text, most = result.text, self.args.max_result_chars
        if len(text) > most:
            text = f"{text[:most]}\n[cut: {len(text) - most} more characters]"
        name = "" if isinstance(call, BadCall) else call.name
        content = f"error: {text}" if result.failed else text
        return {"role": self.role, "name": name, "content": content}
