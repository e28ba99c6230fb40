"""The usual loop: the model's turn, what is said to it, its next turn, up to a limit.

    prompt | turn 1, told 1, turn 2, told 2, ... turn n

Tokens in, tokens out: a turn stays as it was generated, and what is told is the chat template's own
delta (`data/turns.py`). Only the turns are trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from sfpo_megatron.data.errors import shorten
from sfpo_megatron.data.turns import Message, TurnTemplate
from sfpo_megatron.plugins import Foreign
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.rollout.sampling import stop_token_ids
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StopReason: TypeAlias = Literal["answered", "turns", "length"]
_REASONS: tuple[StopReason, ...] = ("answered", "turns", "length")


@dataclass(kw_only=True, frozen=True, slots=True)
class Told:
    """What is said to the model after a turn."""

    messages: Sequence[Message] = ()
    """None: the conversation has ended, and the turn was the answer."""
    reward: float = 0.0
    """Reward of the turn, added to that of the answer."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Summed over the episode into its metrics (`Conversation.counted`)."""


class Conversation(ABC):
    """An environment whose model speaks in turns."""

    uses_chat_template: ClassVar[bool] = True
    """It gets data.chat_template_args, so that later turns are written as the prompt is."""
    role: ClassVar[str] = "user"
    """Who speaks between the model's turns."""
    counted: ClassVar[tuple[str, ...]] = ()
    """Names of `Told.counts` that an episode has 0 of until something is counted, also one whose
    first turn was cut: a metric is a mean over the rollouts that have it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_args: Mapping[str, Any] | None = None,
        max_turns: int = 4,
    ) -> None:
        """DataError for a chat template that cannot be appended to."""
        stops = stop_token_ids(Path(tokenizer.name_or_path), tokenizer)
        self._stops = frozenset(stops)
        self._template = TurnTemplate(tokenizer, chat_template_args or {}, stops, role=self.role)
        self._max_turns = max_turns

    @abstractmethod
    async def respond(self, prompt: Prompt, turns: Sequence[str]) -> Told:
        """What follows the last of the model's turns."""

    def finish(self, prompt: Prompt, episode: Episode, turns: Sequence[str]) -> Episode:
        """The episode as it is returned: the place for a reward and metrics of your own. As it is,
        reward.function scores the answer, which is empty where there is none."""
        return episode

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One rollout."""
        episode, turns = Episode(), list[str]()
        counts = dict.fromkeys(self.counted, 0.0)
        while True:
            begin = len(episode.token_ids)
            completion = await generate((*prompt.token_ids, *episode.token_ids))
            episode = replace(episode.then(completion), scored_from=begin)
            turns.append(self._text(completion.token_ids))
            if not completion.finished:
                return self._ended("length", prompt, episode, turns, counts)
            told = self._checked(await self.respond(prompt, tuple(turns)))
            episode = replace(episode, turn_rewards=episode.turn_rewards + told.reward)
            for name, value in told.counts.items():
                counts[name] = counts.get(name, 0.0) + value
            if not told.messages:
                return self._ended("answered", prompt, episode, turns, counts)
            # No turn comes that could be the answer.
            unanswered = replace(episode, scored_from=len(episode.token_ids), finished=False)
            if len(turns) == self._max_turns:
                return self._ended("turns", prompt, unanswered, turns, counts)
            tokens = self._template.tokens_after_turn(told.messages)
            used = len(prompt.token_ids) + len(episode.token_ids) + len(tokens)
            if used >= generate.context_tokens:
                return self._ended("length", prompt, unanswered, turns, counts)
            episode = episode.told(tokens)

    def _checked(self, told: Foreign) -> Told:
        """What `respond` returned; TypeError for what is no `Told`, before it fails elsewhere."""
        name = f"{type(self).__name__}.respond"
        if not isinstance(told, Told):
            raise TypeError(
                f"{name} returned {shorten(told)}, expected Told(messages=[...]), or Told() "
                "where the last turn was the answer"
            )
        for message in told.messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise TypeError(
                    f"{name} returned a Told with {shorten(message)} among its messages, "
                    'expected {"role": ..., "content": ...}'
                )
        return told

    def _text(self, token_ids: Sequence[int]) -> str:
        ended = bool(token_ids) and token_ids[-1] in self._stops
        return self._template.text(token_ids[: len(token_ids) - ended])

    def _ended(
        self,
        reason: StopReason,
        prompt: Prompt,
        episode: Episode,
        turns: Sequence[str],
        counts: Mapping[str, float],
    ) -> Episode:
        reasons = {f"stop_{name}": float(name == reason) for name in _REASONS}
        metrics = {"turns": float(len(turns)), **reasons, **counts}
        return self.finish(prompt, replace(episode, metrics=metrics), turns)
