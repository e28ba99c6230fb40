"""Runs the environment for the controller: its calls go to the fleet, its episodes are checked.

A rollout has one weight version: an episode that was under way when every engine was lost, and went
on under newer weights, is run again from its start.
"""

from __future__ import annotations

import logging
import math
import numbers
from asyncio import CancelledError, current_task
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import WrongInput
from sfpo_megatron.outputs.declared import is_metric_name
from sfpo_megatron.rollout.episodes import BatchEnvironment, Episode, make_environment
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.lockstep import Generator, Lockstep, together
from sfpo_megatron.rollout.sampling import (
    Completion,
    GenerationSettings,
    branch_seed,
    call_seed,
)
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class EpisodeRunner:
    """Makes the environment that the config names, and runs its episodes."""

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, fleet: Generator
    ) -> None:
        self._name = config.rollout.environment
        self._reproducible = config.rollout.reproducible
        self._fleet = fleet
        try:
            self._environment = make_environment(config, tokenizer)
        except WrongInput:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's constructor raises
            raise self._failure(error, "while it was made") from None

    @property
    def in_lockstep(self) -> bool:
        """Whether the calls of all episodes of a `run` form batches (`lockstep.py`)."""
        return self._reproducible and not isinstance(self._environment, BatchEnvironment)

    def close(self) -> None:
        """End what the environment has started."""
        close = getattr(self._environment, "close", None)
        if callable(close):
            close()

    async def run(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], settings: GenerationSettings
    ) -> list[tuple[Episode, int]]:
        """An episode for each (prompt, seed), with the version of the weights that made it."""
        if isinstance(self._environment, BatchEnvironment):
            return await self._run_batch(self._environment, prompts, seeds, settings)
        if self.in_lockstep:
            return await self._run_in_lockstep(prompts, seeds, settings)
        pairs = zip(prompts, seeds, strict=True)
        return await together(self._run_one(prompt, seed, settings) for prompt, seed in pairs)

    async def _run_batch(
        self,
        environment: BatchEnvironment,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> list[tuple[Episode, int]]:
        while True:
            calls = _Calls(self._fleet, settings)
            try:
                episodes = await environment.run_batch(prompts, calls.ask, seeds)
            except RolloutError:  # an engine's, by way of `generate`
                raise
            except (Exception, SystemExit, CancelledError) as error:
                first, last = prompts[0].id, prompts[-1].id
                raise self._failure(error, f"on prompts {first} to {last}") from None
            if len(episodes) != len(prompts):
                raise RolloutError(
                    f"rollout.environment: {self._name} made {len(episodes)} episodes on prompts "
                    f"{prompts[0].id} to {prompts[-1].id}, expected {len(prompts)}"
                )
            if calls.have_one_version:
                pairs = zip(episodes, prompts, strict=True)
                return [(self._checked(e, prompt, settings), calls.version) for e, prompt in pairs]

    async def _run_one(
        self, prompt: Prompt, seed: int, settings: GenerationSettings
    ) -> tuple[Episode, int]:
        while True:
            turns = _Turns(self._fleet, settings, prompt=prompt, seed=seed)
            episode = await self._played(prompt, turns, seed, settings)
            if turns.have_one_version:
                return episode, turns.version

    async def _run_in_lockstep(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], settings: GenerationSettings
    ) -> list[tuple[Episode, int]]:
        """All are begun again together, so that the batches are those of a run without a loss."""
        while True:
            lockstep = Lockstep(self._fleet, len(prompts))
            pairs = list(zip(prompts, seeds, strict=True))
            turns = [
                _LockstepTurns(lockstep, number, settings, prompt=prompt, seed=seed)
                for number, (prompt, seed) in enumerate(pairs)
            ]
            episodes = await lockstep.run(
                self._played(prompt, calls, seed, settings)
                for (prompt, seed), calls in zip(pairs, turns, strict=True)
            )
            if len(lockstep.versions) <= 1:
                version = min(lockstep.versions, default=self._fleet.version)
                return [(episode, version) for episode in episodes]

    async def _played(
        self, prompt: Prompt, turns: _Turns, seed: int, settings: GenerationSettings
    ) -> Episode:
        try:
            episode = await self._environment.run(prompt, turns, seed)
        except RolloutError:
            raise
        except (Exception, SystemExit, CancelledError) as error:
            raise self._failure(error, f"on prompt {prompt.id}") from None
        return self._checked(episode, prompt, settings)

    def _checked(self, episode: Episode, prompt: Prompt, settings: GenerationSettings) -> Episode:
        """The episode, no longer than a response may be; RolloutError if it is not one."""
        fault = _fault(episode)
        if fault is not None:
            raise RolloutError(
                f"rollout.environment: {self._name} on prompt {prompt.id}: {fault}; build what it "
                "returns with Episode().then(completion).told(token_ids)"
            )
        return episode.cut_to(settings.max_response_tokens)

    def _failure(self, error: BaseException, when: str) -> BaseException:
        """What to raise for it: itself if we have cancelled the environment, not it itself."""
        task = current_task() if isinstance(error, CancelledError) else None
        if task is not None and task.cancelling():
            return error
        log.error("%s raised %s", self._name, when, exc_info=error)
        return RolloutError(
            f"rollout.environment: {self._name} raised {type(error).__name__}: {error} {when}; "
            "the traceback is in logs/controller.log"
        )


def _fault(episode: Episode) -> str | None:
    """What is wrong with what a user's environment returned."""
    if not isinstance(episode, Episode):
        return f"found {type(episode).__name__}, expected an Episode"
    tokens, logprobs, mask = episode.token_ids, episode.logprobs, episode.response_mask
    if not len(tokens) == len(logprobs) == len(mask):
        return (
            f"found {len(tokens)} token_ids, {len(logprobs)} logprobs and {len(mask)} "
            "response_mask, expected as many of each"
        )
    for key in episode.metrics:
        if not is_metric_name(key):
            return f"found {key!r} as the name of a metric, expected printable text"
    trained = [x for x, is_trained in zip(logprobs, mask, strict=True) if is_trained]
    named = {"a trained token's log-prob": trained, "metrics": list(episode.metrics.values())}
    named["reward"] = [] if episode.reward is None else [episode.reward]
    named["turn_rewards"] = [episode.turn_rewards]
    for name, values in named.items():
        if set(map(type, values)) <= {float} and all(map(math.isfinite, values)):
            continue  # what nearly all are; asking a number for its class takes ten times as long
        for value in values:
            if not _is_finite(value):
                return f"found {value!r} as {name}, expected a finite number"
    return None


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can be."""
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


class _Calls:
    """The generations that rollouts were made of, and by which weights."""

    def __init__(self, fleet: Generator, settings: GenerationSettings) -> None:
        self._fleet = fleet
        self._settings = settings
        self._versions: set[int] = set()  # one set for all branches

    async def ask(
        self, token_ids: Sequence[tuple[int, ...]], seeds: Sequence[int]
    ) -> list[Completion]:
        """`episodes.GenerateAll`."""
        settings = [self._settings] * len(seeds)
        made, version = await self._fleet.generate(list(token_ids), list(seeds), settings)
        self._versions.add(version)
        return made

    @property
    def have_one_version(self) -> bool:
        return len(self._versions) <= 1

    @property
    def version(self) -> int:
        """Version of the weights; where nothing was generated, the current one."""
        return min(self._versions, default=self._fleet.version)


class _Turns(_Calls):
    """`episodes.Generate` for one rollout."""

    def __init__(
        self, fleet: Generator, settings: GenerationSettings, *, prompt: Prompt, seed: int
    ) -> None:
        super().__init__(fleet, settings)
        self.context_tokens = len(prompt.token_ids) + settings.max_response_tokens
        self.temperature, self.top_p = settings.temperature, settings.top_p
        self._seed = seed
        self._number = 0

    def branch(self, number: int) -> _Turns:
        """`episodes.Generate.branch`."""
        branch = copy(self)
        branch._seed, branch._number = branch_seed(self._seed, number), 0
        return branch

    async def __call__(
        self, token_ids: Sequence[int], *, seed: int | None = None, max_tokens: int | None = None
    ) -> Completion:
        number, self._number = self._number, self._number + 1
        limit = min(self._settings.max_response_tokens, self.context_tokens - len(token_ids))
        if max_tokens is not None:
            limit = min(limit, max_tokens)
        if limit < 1:
            return Completion(token_ids=(), logprobs=(), finished=False)
        completion, version = await self._generate(
            tuple(map(int, token_ids)),
            call_seed(self._seed, number) if seed is None else seed,
            replace(self._settings, max_response_tokens=limit),
        )
        self._versions.add(version)
        return completion

    async def _generate(
        self, token_ids: tuple[int, ...], seed: int, settings: GenerationSettings
    ) -> tuple[Completion, int]:
        (completion,), version = await self._fleet.generate([token_ids], [seed], [settings])
        return completion, version


class _LockstepTurns(_Turns):
    """The same where the calls of all rollouts form batches."""

    def __init__(
        self,
        lockstep: Lockstep,
        number: int,
        settings: GenerationSettings,
        *,
        prompt: Prompt,
        seed: int,
    ) -> None:
        super().__init__(lockstep.fleet, settings, prompt=prompt, seed=seed)
        self._lockstep, self._episode = lockstep, number

    def branch(self, number: int) -> _Turns:
        raise RolloutError(
            "rollout.reproducible: found a call of `generate.branch`, expected none: in which "
            "order the calls of branches come is the engines'; call `generate` itself, or set "
            "rollout.reproducible=false"
        )

    async def _generate(
        self, token_ids: tuple[int, ...], seed: int, settings: GenerationSettings
    ) -> tuple[Completion, int]:
        return await self._lockstep.generate(self._episode, token_ids, seed, settings)
