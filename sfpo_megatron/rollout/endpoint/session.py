"""One agent's requests as one growing sequence of tokens.

    messages of request 1 | turn 1, what was said since, turn 2, what was said since, turn 3 ...

A request whose messages go on from an earlier turn's gets that turn's tokens, as they were
generated, and the chat template's delta. Nothing recorded is changed. Any other request begins a
branch: from the last turn that it still has, or from nothing. A turn that its client has given up
is recorded when that asks the same again, and only then.
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

_ENDED = "the episode has ended"


@dataclass(kw_only=True, eq=False, slots=True)
class Turn:
    """A turn of the model, with all before it."""

    messages: tuple[Message, ...]
    tools: str
    episode: Episode
    parent: Turn | None
    """The one that it goes on from."""
    generate: Generate
    """Generation with the limits of its branch."""
    number: int
    """How many turns its branch has up to here."""


@dataclass(kw_only=True, eq=False, slots=True)
class _Call:
    """A turn that is being generated, or that was when its client gave it up."""

    request: ChatRequest
    is_awaited: Callable[[], bool]
    parent: Turn | None
    generate: Generate
    start: Episode
    """What the turn is added to."""
    prompt: tuple[int, ...]
    """All tokens before the turn."""
    completion: asyncio.Task[Completion]

    def is_retried_by(self, request: ChatRequest) -> bool:
        """Whether its client has gone, and the same is asked again."""
        return not self.is_awaited() and _asked(self.request) == _asked(request)


def _asked(request: ChatRequest) -> tuple[object, ...]:
    """What a completion depends on."""
    return request.messages, request.tools, request.max_tokens


class Session:
    """Records an agent's turns. Used in one event loop, which makes it."""

    def __init__(
        self,
        templates: ChatTemplates,
        generate: Generate,
        *,
        call_format: CallFormat,
        max_response_tokens: int,
    ) -> None:
        """`max_response_tokens`: most tokens after those of a branch's first request."""
        self._templates, self._generate, self._call_format = templates, generate, call_format
        self._max_response_tokens = max_response_tokens
        self.turns: list[Turn] = []
        """All turns in the order in which they ended; only ever added to."""
        self.unread: Episode | None = None
        """The last turn that ended, whether a client still waited for it or not."""
        self.num_branches = 1
        self.rewritten = ""
        """Which request first left the history, for people; empty: none did."""
        self.num_too_long = 0
        """Requests that left no room for a turn."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception that generation has raised."""
        self._num_requests = 0
        self._calls: list[_Call] = []
        """Those that are not recorded."""
        self._is_closed = False

    async def answer(
        self, request: ChatRequest, *, is_awaited: Callable[[], bool] = lambda: True
    ) -> Answer:
        """The model's turn after `request`, recorded; ApiError for a request without one. A turn
        that nobody awaits any more is not recorded, as no reward was given for it: it is kept for
        the client that asks the same again."""
        if self._is_closed:  # since its key was looked up: the body came late
            raise ApiError(_ENDED, status=410)
        number, self._num_requests = self._num_requests, self._num_requests + 1
        call = self._retried(request, is_awaited) or self._begun(request, is_awaited)
        completion = await self._completion(call)
        if not is_awaited():
            raise ConnectionResetError("Connection lost")
        text = self._templates.turn_text(completion.token_ids)
        call_format = self._call_format if request.tools else None
        message, finish = _said(text, completion, number, call_format)
        self._calls.remove(call)
        self.turns.append(
            Turn(
                messages=(*request.messages, as_client(message)),
                tools=request.tools,
                episode=_with_turn(call.start, completion),
                parent=call.parent,
                generate=call.generate,
                number=1 if call.parent is None else call.parent.number + 1,
            )
        )
        texts = self._templates.token_texts(completion.token_ids)
        return Answer(
            id=f"chatcmpl-{number}",
            message=message,
            finish_reason=finish,
            tokens=tuple(zip(texts, completion.logprobs, strict=True)),
            num_prompt_tokens=len(call.prompt),
        )

    async def close(self) -> None:
        """Record no more, and free the engines. Where nothing was recorded, what they still say is
        the episode (`unread`): it is waited for."""
        self._is_closed = True
        if self.turns:
            self.abandon()
        if self._calls:
            await asyncio.wait([call.completion for call in self._calls])

    def abandon(self) -> None:
        """Record no more, and free the engines at once."""
        self._is_closed = True
        for call in self._calls:
            call.completion.cancel()

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
        return max(
            fitting, key=lambda turn: (len(turn.messages), not self._after(turn)), default=None
        )

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
        if self._room(episode) < 1:
            self.num_too_long += 1
            raise ApiError(
                f"found {len(episode.prompt_token_ids)} tokens and {len(episode.token_ids)} after "
                f"them, expected fewer than {self._generate.context_tokens} together and fewer "
                f"than rollout.max_response_tokens ({self._max_response_tokens}) after them",
                param="messages",
                code="context_length_exceeded",
            )
        return episode, (*episode.prompt_token_ids, *episode.token_ids)

    def _room(self, episode: Episode) -> int:
        """How many tokens the next turn may have."""
        room = self._generate.context_tokens - len(episode.prompt_token_ids)
        return min(room, self._max_response_tokens) - len(episode.token_ids)

    def _branch(self, parent: Turn | None, generate: Generate) -> Generate:
        """`generate`, that of the history so far, for a turn after `parent`; where another turn has
        it, that of a branch which begins here."""
        if all(one.generate is not generate for one in self._after(parent)):
            return generate
        number, self.num_branches = self.num_branches, self.num_branches + 1
        if not self.rewritten:
            kept = 0 if parent is None else len(parent.messages)
            self.rewritten = f"request {self._num_requests} kept {kept} messages of what was said"
        return self._generate.branch(number)

    def _after(self, turn: Turn | None) -> list[Turn | _Call]:
        """The turns right after `turn` (None: the first ones) that are recorded or awaited."""
        known: list[Turn | _Call] = [*self.turns, *(c for c in self._calls if c.is_awaited())]
        return [one for one in known if one.parent is turn]

    # ---- the turn ------------------------------------------------------------------------------

    def _retried(self, request: ChatRequest, is_awaited: Callable[[], bool]) -> _Call | None:
        """The call that `request` asks for once more."""
        for call in self._calls:
            if call.is_retried_by(request):
                call.generate = self._branch(call.parent, call.generate)
                call.is_awaited = is_awaited
                return call
        return None

    def _begun(self, request: ChatRequest, is_awaited: Callable[[], bool]) -> _Call:
        parent = self._continued_by(request)
        start, prompt = self._tokens(parent, request)
        generate = self._branch(parent, self._generate if parent is None else parent.generate)
        room = self._room(start)
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)

        async def made() -> Completion:
            try:
                completion = await generate(prompt, max_tokens=max_tokens)
            except Exception as error:
                if not self.failed.done():
                    self.failed.set_exception(error)
                    self.failed.exception()  # seen, should the agent have ended by now
                raise
            self.unread = _with_turn(start, completion)
            return completion

        call = _Call(
            request=request,
            is_awaited=is_awaited,
            parent=parent,
            generate=generate,
            start=start,
            prompt=prompt,
            completion=asyncio.create_task(made()),
        )
        self._calls.append(call)
        return call

    async def _completion(self, call: _Call) -> Completion:
        await asyncio.wait({call.completion})  # a client that goes does not end it
        if self._is_closed:
            raise ApiError(_ENDED, status=410)
        try:
            return call.completion.result()
        except Exception:
            raise ApiError("the engines have failed", status=503) from None


def _said(
    text: str, completion: Completion, number: int, call_format: CallFormat | None
) -> tuple[Message, str]:
    """The turn of request `number` as a message, and why it ended; without a format it calls no
    tools."""
    message: JsonObject = {"role": "assistant", "content": text}
    if not completion.finished:
        return message, "length"
    calls = calls_in(text, call_format) if call_format else []
    good = [call for call in calls if isinstance(call, ToolCall)]
    if not call_format or not calls or any(isinstance(call, BadCall) for call in calls):
        return message, "stop"
    message["content"] = _beside_calls(text, call_format)
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
