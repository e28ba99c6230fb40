"""One agent's requests as one growing sequence of tokens.

    messages of request 1 | turn 1, what was said since, turn 2, what was said since, turn 3 ...

A request whose messages go on from an earlier turn's gets that turn's tokens, as they were
generated, and the chat template's delta. Nothing recorded is changed. Any other request begins a
branch: from the last turn that it still has, or from nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from sfpo_megatron.config.environments import CallFormat
from sfpo_megatron.data.turns import Message
from sfpo_megatron.rollout.endpoint.protocol import (
    Answer,
    ApiError,
    ChatRequest,
    JsonObject,
    as_client,
)
from sfpo_megatron.rollout.endpoint.templates import ChatTemplates
from sfpo_megatron.rollout.environments.tool_calls import BadCall, ToolCall, calls_in
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.rollout.sampling import Completion


@dataclass(kw_only=True, eq=False, slots=True)
class Turn:
    """A turn of the model, with all before it."""

    messages: tuple[Message, ...]
    tools: str
    episode: Episode
    generate: Generate
    """That of its branch."""
    number: int
    """How many turns its branch has up to here."""
    continued: bool = False
    """A turn follows, or is being generated."""


class Session:
    """Records an agent's turns. Used in one event loop, which makes it."""

    def __init__(
        self, templates: ChatTemplates, generate: Generate, *, call_format: CallFormat
    ) -> None:
        self._templates, self._generate, self._call_format = templates, generate, call_format
        self.turns: list[Turn] = []
        """In the order in which they ended; only ever added to."""
        self.unread: Episode | None = None
        """The last turn that ended, whether a client still waited for it or not."""
        self.num_branches = 0
        self.rewritten = ""
        """Which request first left the history, for people; empty: none did."""
        self.num_too_long = 0
        """Requests that left no room for a turn."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception that generation has raised."""
        self._num_requests = 0
        self._calls: set[asyncio.Task[Completion]] = set()
        self._is_closed = False

    async def answer(
        self, request: ChatRequest, *, is_awaited: Callable[[], bool] = lambda: True
    ) -> Answer:
        """The model's turn after `request`, recorded; ApiError for a request without one. A turn
        that nobody awaits any more, whose client may have asked again, is not recorded: no reward
        was given for it."""
        number, self._num_requests = self._num_requests, self._num_requests + 1
        parent = self._continued_by(request)
        start, tokens = self._tokens(parent, request)
        generate = self._branch(parent, request)
        completion = await self._call(generate, start, tokens, request.max_tokens)
        if not is_awaited():
            raise ConnectionResetError("Connection lost")
        message, finish = self._said(completion, request, number)
        self.turns.append(
            Turn(
                messages=(*request.messages, as_client(message)),
                tools=request.tools,
                episode=_with_turn(start, completion),
                generate=generate,
                number=1 if parent is None else parent.number + 1,
            )
        )
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return Answer(
            id=f"chatcmpl-{number}",
            message=message,
            finish_reason=finish,
            tokens=tuple((self._templates.token_text(token), x) for token, x in pairs),
            num_prompt_tokens=len(tokens),
        )

    async def close(self) -> None:
        """Record no more. Returns when no engine works for it: a refit may follow."""
        self._is_closed = True
        if self._calls:
            await asyncio.wait(self._calls)

    # ---- from messages to tokens ---------------------------------------------------------------

    def _continued_by(self, request: ChatRequest) -> Turn | None:
        """The turn with the longest history that `request` goes on from."""
        messages = request.messages
        if messages[-1]["role"] == "assistant":
            raise ApiError(
                "messages: the last is the assistant's; a turn is not continued", param="messages"
            )
        fitting = [
            turn
            for turn in self.turns
            if turn.tools == request.tools
            and len(turn.messages) < len(messages)
            and turn.messages == messages[: len(turn.messages)]
            and all(m["role"] != "assistant" for m in messages[len(turn.messages) :])
        ]
        return max(fitting, key=lambda turn: (len(turn.messages), not turn.continued), default=None)

    def _tokens(self, parent: Turn | None, request: ChatRequest) -> tuple[Episode, tuple[int, ...]]:
        """The episode that the turn is added to, and all tokens before the turn."""
        if parent is None:
            told = self._templates.whole(request.messages, request.tools)
            episode = Episode(prompt_token_ids=told)
        else:
            new = request.messages[len(parent.messages) :]
            told = self._templates.after_turn(new, request.tools)
            episode = parent.episode.told(
                told if parent.episode.finished else (self._templates.end_id, *told)
            )
        tokens = (*episode.prompt_token_ids, *episode.token_ids)
        if len(tokens) >= self._generate.context_tokens:
            self.num_too_long += 1
            raise ApiError(
                f"found {len(tokens)} tokens, expected fewer than {self._generate.context_tokens}:"
                " those of the prompt and rollout.max_response_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        return episode, tokens

    def _branch(self, parent: Turn | None, request: ChatRequest) -> Generate:
        """Calls of the branch that the turn belongs to, which begins here where the history was
        left."""
        goes_on = parent is not None and not parent.continued
        if parent is not None:
            parent.continued = True
            if goes_on:
                return parent.generate
        number, self.num_branches = self.num_branches, self.num_branches + 1
        if number == 0:
            return self._generate
        if not self.rewritten:
            kept = 0 if parent is None else len(parent.messages)
            self.rewritten = f"request {self._num_requests} kept {kept} messages of what was said"
        return self._generate.branch(number)

    # ---- the turn ------------------------------------------------------------------------------

    async def _call(
        self, generate: Generate, start: Episode, tokens: tuple[int, ...], max_tokens: int | None
    ) -> Completion:
        async def made() -> Completion:
            completion = await generate(tokens, max_tokens=max_tokens)
            self.unread = _with_turn(start, completion)
            return completion

        task = asyncio.create_task(made())  # of its own: a client that goes does not end it
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            completion = await task
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)
                self.failed.exception()  # seen, should the agent have ended by now
            raise ApiError("the engines have failed", status=503) from None
        if self._is_closed:
            raise ApiError("the episode has ended", status=410)
        return completion

    def _said(
        self, completion: Completion, request: ChatRequest, number: int
    ) -> tuple[Message, str]:
        """The turn as a message, and why it ended."""
        text = self._templates.turn_text(completion.token_ids)
        message: JsonObject = {"role": "assistant", "content": text}
        if not completion.finished:
            return message, "length"
        calls = calls_in(text, self._call_format) if request.tools else []
        good = [call for call in calls if isinstance(call, ToolCall)]
        if not calls or any(isinstance(call, BadCall) for call in calls):
            return message, "stop"
        message["content"] = _beside_calls(text, self._call_format)
        message["tool_calls"] = [
            {
                "id": f"call_{number}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(good)
        ]
        return message, "tool_calls"


def _with_turn(start: Episode, completion: Completion) -> Episode:
    return replace(start.then(completion), scored_from=len(start.token_ids))


def _beside_calls(turn: str, call_format: CallFormat) -> str:
    """What the turn says besides its calls."""
    thought, end, said = turn.rpartition("</think>")
    return thought + end + (said.partition("<tool_call>")[0] if call_format == "hermes" else "")
