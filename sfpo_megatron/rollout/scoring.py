"""Makes scored rollouts of completions, beside generation: a thread and the pool's processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.tokenize import load_tokenizer, response_text
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.http import HTTP
from sfpo_megatron.rewards.pool import Score, ScoringPool
from sfpo_megatron.rollout.episodes import Episode
from sfpo_megatron.rollout.sampling import stop_token_ids
from sfpo_megatron.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
T = TypeVar("T")

_CLOSE_S = 2.0


class Scorer:
    """Holds tokenizer and scoring pool."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    _pool: ScoringPool

    def __init__(self, config: RunConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._threads = ThreadPoolExecutor(_num_threads(config), thread_name_prefix="scorer")
        self._open = ExitStack()

    async def start(self) -> None:
        """Load the tokenizer and start the pool."""
        await self._in_thread(self._prepare)

    def _prepare(self) -> None:
        self.tokenizer = load_tokenizer(self._model_path)
        self.stop_token_ids = stop_token_ids(Path(self._model_path), self.tokenizer)
        run = RunDirectory.of(self._config.output_dir)
        pool = ScoringPool(self._config.reward, run, rewards=self._config.rewards)
        self._pool = self._open.enter_context(pool)

    async def close(self) -> None:
        """End the pool's processes."""
        await asyncio.wait([self._in_thread(self._open.close)], timeout=_CLOSE_S)

    async def score(
        self, members: Sequence[tuple[Prompt, int]], episodes: Sequence[tuple[Episode, int]]
    ) -> list[Rollout]:
        """The rollouts of (prompt, sample) pairs, in order; `episodes`: the episode of each, with
        the version of the weights that made it."""
        return await self._in_thread(self._score, members, episodes)

    def _score(
        self, members: Sequence[tuple[Prompt, int]], episodes: Sequence[tuple[Episode, int]]
    ) -> list[Rollout]:
        before = [self._text(e.token_ids[: e.scored_from]) for e, _ in episodes]
        scored = [self._text(e.token_ids[e.scored_from :]) for e, _ in episodes]
        prompts = [prompt for prompt, _ in members]
        scores = self._scores(prompts, scored, [episode.reward for episode, _ in episodes])
        return [
            Rollout(
                prompt_id=prompt.id,
                sample=sample,
                prompt_token_ids=episode.prompt_token_ids or prompt.token_ids,
                token_ids=episode.token_ids,
                generator_logprobs=episode.logprobs,
                response_mask=episode.response_mask,
                finished=episode.finished,
                text=unread + text,
                scored_at=len(unread),
                reward=score.reward + episode.turn_rewards,
                correct=score.correct,
                parts=score.parts,
                weight_version=version,
                metrics=metrics_of(episode),
            )
            for (prompt, sample), (episode, version), unread, text, score in zip(
                members, episodes, before, scored, scores, strict=True
            )
        ]

    def _text(self, token_ids: Sequence[int]) -> str:
        return response_text(self.tokenizer, token_ids, self.stop_token_ids)

    def _scores(
        self, prompts: Sequence[Prompt], texts: Sequence[str], own: Sequence[float | None]
    ) -> list[Score]:
        """The environment's own rewards, and the verifier's where there is none."""
        triples = zip(prompts, texts, own, strict=True)
        asked = [(prompt, text) for prompt, text, reward in triples if reward is None]
        rewards = [prompt.reward for prompt, _ in asked]
        found = iter(self._pool.score(asked, rewards) if asked else ())
        return [
            next(found)
            if reward is None
            else Score(reward=reward, correct=reward >= 1, timed_out=False)
            for reward in own
        ]

    def _in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        call = partial(function, *args, **kwargs)
        return asyncio.get_running_loop().run_in_executor(self._threads, call)


def metrics_of(episode: Episode) -> dict[str, float]:
    """What the environment measured, and the rewards that it gave itself."""
    own = {} if episode.reward is None else {"reward": episode.reward}
    turns = {"turn_rewards": episode.turn_rewards} if episode.turn_rewards else {}
    return {**own, **turns, **episode.metrics}


def _num_threads(config: RunConfig) -> int:
    """One: the processes are asked one call at a time, in order. A server of the user's own scores
    several, so that its answers are not waited for one after the other."""
    functions = config.reward.functions(config.rewards)
    return config.reward.http.concurrency if any(one.name == HTTP for one in functions) else 1
