"""A fleet that answers by prompt and seed, and episodes of an environment on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from made.configs import run_config

from sfpo_megatron.rollout.episode_runner import EpisodeRunner, Generator
from sfpo_megatron.rollout.episodes import Episode
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings
from sfpo_megatron.types import Prompt

SETTINGS = GenerationSettings(temperature=1.0, top_p=1.0, max_response_tokens=10, stop_token_ids=())
Call = tuple[list[tuple[int, ...]], list[int], list[GenerationSettings]]


def prompt_of(name: str, *token_ids: int) -> Prompt:
    return Prompt(id=name, text="", token_ids=token_ids, question="", answer="")


def complete(prompt: tuple[int, ...], seed: int, limit: int) -> Completion:
    """Three tokens that only (prompt, seed) decide, fewer where the limit is lower."""
    tokens = tuple((sum(prompt) + seed + i) % 97 + 1 for i in range(min(3, limit)))
    logprobs = tuple(-0.25 * token for token in tokens)
    return Completion(token_ids=tokens, logprobs=logprobs, finished=limit > 3)


class Engines(Generator):
    """The fleet: answers, and keeps its calls."""

    def __init__(self, version: int = 5) -> None:
        self.version = version
        self.calls: list[Call] = []

    async def generate(
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        settings: list[GenerationSettings],
    ) -> tuple[list[Completion], int]:
        self.calls.append((prompts, seeds, settings))
        await asyncio.sleep(0)
        asked = zip(prompts, seeds, settings, strict=True)
        return [complete(p, seed, s.max_response_tokens) for p, seed, s in asked], self.version


class WordTokenizer:
    """One token a word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()]


def runner_of(name: str, fleet: Generator, **rollout: Any) -> EpisodeRunner:
    config = run_config(rollout={"environment": name} | rollout)
    return EpisodeRunner(config, WordTokenizer(), fleet)


def run(
    name: str, prompts: Sequence[Prompt], fleet: Generator, limits: GenerationSettings = SETTINGS
) -> list[tuple[Episode, int]]:
    seeds = [100 * (i + 1) for i in range(len(prompts))]
    return asyncio.run(runner_of(name, fleet).run(prompts, seeds, limits))
