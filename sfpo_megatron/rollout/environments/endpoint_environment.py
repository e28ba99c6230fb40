"""What plays an episode asks the rollout endpoint for the model's turns, from a program of its own.

Agents run in a thread of their own: one that blocks holds up other agents, not the controller. What
is trained on is the branch of the last turn (`endpoint/session.py`).
"""

from __future__ import annotations

import asyncio
import logging
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from sfpo_megatron.config.agents import EndpointArgs
from sfpo_megatron.host.event_loops import LoopThread
from sfpo_megatron.plugins import Foreign
from sfpo_megatron.rollout.endpoint.protocol import Sampling
from sfpo_megatron.rollout.endpoint.server import HOST, Endpoint
from sfpo_megatron.rollout.endpoint.session import Session
from sfpo_megatron.rollout.endpoint.templates import ChatTemplates
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.rollout.sampling import Completion, stop_token_ids
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StopReason: TypeAlias = Literal["answered", "length", "timeout", "error"]
_REASONS: tuple[StopReason, ...] = ("answered", "length", "timeout", "error")

log = logging.getLogger(__name__)


class EndpointEnvironment(ABC):
    """An environment whose episodes are played by clients of the endpoint."""

    uses_chat_template: ClassVar[bool] = True
    """It gets data.chat_template_args."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: EndpointArgs,
        *,
        name: str,
        chat_template_args: Mapping[str, Any] | None,
    ) -> None:
        """Starts the endpoint; `close` ends it. `name`: what plays, for messages."""
        self._args, self._name = args, name
        stops = stop_token_ids(Path(tokenizer.name_or_path), tokenizer)
        self._templates = ChatTemplates(tokenizer, chat_template_args or {}, stops)
        self._endpoint = Endpoint(max_request_bytes=args.max_request_bytes)
        _ask_without_proxy(HOST)
        self._agents = LoopThread("agents")
        self._told_of: set[str] = set()

    @abstractmethod
    async def play(self, api_key: str, prompt: Prompt, seed: int) -> Foreign:
        """One episode, in the agents' thread; returns what `outcome_of` takes."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One rollout."""
        engines = _Elsewhere(generate, asyncio.get_running_loop())
        return await self._endpoint.thread.start(self._episode(prompt, engines, seed))

    def close(self) -> None:
        """End agents and endpoint."""
        self._agents.close()
        self._endpoint.close()

    async def _episode(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """Runs in the endpoint's thread."""
        session = Session(
            self._templates,
            generate,
            call_format=self._args.call_format,
            max_response_tokens=generate.context_tokens - len(prompt.token_ids),
        )
        sampling = Sampling(temperature=generate.temperature, top_p=generate.top_p)
        try:
            with self._endpoint.serving(session, sampling) as key:
                agent = self._agents.start(self.play(key, prompt, seed))
                ends: set[asyncio.Future[Any]] = {agent, session.failed}
                try:
                    await asyncio.wait(
                        ends, timeout=self._args.timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    in_time = not agent.cancel()
            await session.close()
        except asyncio.CancelledError:
            session.abandon()
            raise
        if session.failed.done():
            session.failed.result()  # raises what the engines did
        return self._recorded(session, agent, in_time=in_time)

    def _recorded(
        self, session: Session, agent: asyncio.Future[Foreign], *, in_time: bool
    ) -> Episode:
        """What the session has come to."""
        returned, reason = None, _reason(session, agent, in_time=in_time)
        if agent.cancelled() and in_time:
            self._tell_once("cancelled", "an agent raised CancelledError: it cancelled itself")
        elif not agent.cancelled():
            error = agent.exception()
            if error is None:
                returned = agent.result()
            elif session.unread is None:
                raise error  # before the model could have had a part in it
            else:
                self._tell_once("raised", f"an agent raised {type(error).__name__}: {error}", error)
        if session.unread is None:
            raise ValueError(f"{self._name} ended without a turn of the model ({reason})")
        if not session.turns and reason == "answered":  # its client gave each turn up
            reason = "error"
        if session.rewritten:
            self._tell_once("rewrote", f"an agent rewrote its history: {session.rewritten}")
        outcome = outcome_of(returned)
        episode = session.turns[-1].episode if session.turns else session.unread
        if reason != "answered":
            episode = replace(episode, finished=False, scored_from=len(episode.token_ids))
        metrics = {
            "turns": float(session.turns[-1].number if session.turns else 0),
            "requests": float(len(session.turns)),
            "branches": float(session.num_branches),
            **{f"stop_{name}": float(name == reason) for name in _REASONS},
            **outcome.metrics,
        }
        return replace(episode, reward=outcome.reward, metrics=metrics)

    def _tell_once(self, kind: str, what: str, error: BaseException | None = None) -> None:
        if kind not in self._told_of:
            self._told_of.add(kind)
            log.warning("%s (said once; metrics count all)", what, exc_info=error)


@dataclass(kw_only=True, frozen=True, slots=True)
class Outcome:
    """What an agent says of its episode."""

    reward: float | None
    metrics: Mapping[str, float]


def outcome_of(returned: Foreign) -> Outcome:
    """None: reward.function scores the last turn; a number: the reward; a mapping: metrics, and the
    reward as `reward`."""
    if returned is None or isinstance(returned, numbers.Real):
        return Outcome(reward=None if returned is None else float(returned), metrics={})
    if isinstance(returned, Mapping):
        metrics = {str(name): float(value) for name, value in returned.items()}
        return Outcome(reward=metrics.pop("reward", None), metrics=metrics)
    raise ValueError(
        f"an agent returned {type(returned).__name__}, expected a number, a mapping of numbers or "
        "None"
    )


def _reason(session: Session, agent: asyncio.Future[Foreign], *, in_time: bool) -> StopReason:
    if agent.cancelled() and not in_time:
        return "timeout"
    if not agent.cancelled() and agent.exception() is None:
        return "answered"
    return "length" if session.num_too_long else "error"


def _ask_without_proxy(host: str) -> None:
    """Clients in this process, and those that it starts, take no proxy for `host`."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [entry for entry in os.environ.get(name, "").split(",") if entry]
        if host not in hosts:
            os.environ[name] = ",".join([*hosts, host])


class _Elsewhere(Generate):
    """`generate` for another thread than that of its loop."""

    def __init__(self, generate: Generate, loop: asyncio.AbstractEventLoop) -> None:
        self._generate, self._loop = generate, loop
        self.context_tokens = generate.context_tokens
        self.temperature, self.top_p = generate.temperature, generate.top_p

    def __call__(
        self, token_ids: Sequence[int], *, seed: int | None = None, max_tokens: int | None = None
    ) -> Awaitable[Completion]:
        async def ask() -> Completion:
            return await self._generate(token_ids, seed=seed, max_tokens=max_tokens)

        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(), self._loop))

    def branch(self, number: int) -> Generate:
        return _Elsewhere(self._generate.branch(number), self._loop)
