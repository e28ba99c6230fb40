"""From completions to scored rollouts, beside generation: a thread and the pool's processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rollout.sampling import Completion, stop_token_ids
from sfpo_megatron.types import Prompt, Rollout

_CLOSE_S = 2.0


class Scorer:
    """Holds tokenizer and scoring pool."""

    stop_token_ids: tuple[int, ...]
    _pool: ScoringPool

    def __init__(self, config: RunConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        # One thread: the pool is not asked twice at a time, and batches keep their order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._open = ExitStack()

    async def start(self) -> None:
        """Load the tokenizer and start the pool."""
        await self._in_thread(self._prepare)

    def _prepare(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self._model_path)
        self.stop_token_ids = stop_token_ids(Path(self._model_path), self._tokenizer)
        run = RunDirectory.of(self._config.output_dir)
        self._pool = self._open.enter_context(ScoringPool(self._config.reward, run))

    async def close(self) -> None:
        """End the pool's processes."""
        await asyncio.wait([self._in_thread(self._open.close)], timeout=_CLOSE_S)

    async def score(
        self,
        members: Sequence[tuple[Prompt, int]],
        completions: Sequence[Completion],
        weight_version: int,
    ) -> list[Rollout]:
        """The rollouts of (prompt, sample) pairs, in order."""
        return await self._in_thread(self._score, members, completions, weight_version)

    def _score(
        self,
        members: Sequence[tuple[Prompt, int]],
        completions: Sequence[Completion],
        weight_version: int,
    ) -> list[Rollout]:
        texts = [
            self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            for completion in completions
        ]
        prompts = [prompt for prompt, _ in members]
        scores = self._pool.score(list(zip(prompts, texts, strict=True)))
        return [
            Rollout(
                prompt_id=prompt.id,
                sample=sample,
                prompt_token_ids=prompt.token_ids,
                token_ids=completion.token_ids,
                generator_logprobs=completion.logprobs,
                finished=completion.finished,
                text=text,
                reward=score.reward,
                correct=score.correct,
                parts=score.parts,
                weight_version=weight_version,
            )
            for (prompt, sample), completion, text, score in zip(
                members, completions, texts, scores, strict=True
            )
        ]

    def _in_thread(self, function: Any, *args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
