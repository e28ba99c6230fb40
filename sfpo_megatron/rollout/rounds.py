"""The rounds of a request: an episode for every sample, scored while others are still generated."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sfpo_megatron.rollout.episode_runner import EpisodeRunner, together
from sfpo_megatron.rollout.reports import RolloutCount, RolloutTimes
from sfpo_megatron.rollout.sampling import (
    ROLLOUTS_PER_CALL,
    GenerationSettings,
    RolloutRequest,
    request_seed,
)
from sfpo_megatron.rollout.scoring import Scorer
from sfpo_megatron.rollout.selection import GroupSelection
from sfpo_megatron.types import Prompt, Rollout


class Rounds:
    """Needs a scorer that was started."""

    def __init__(self, run_seed: int, runner: EpisodeRunner, scorer: Scorer) -> None:
        self._run_seed = run_seed
        self._runner = runner
        self._scorer = scorer

    async def until_full(
        self, request: RolloutRequest, count: RolloutCount
    ) -> tuple[GroupSelection, RolloutTimes]:
        """Run rounds until as many groups are chosen as the request wants, or there is no further
        round; `count` follows."""
        began = last_token = time.monotonic()
        num_groups = len(request.prompts) if request.num_groups is None else request.num_groups
        while True:
            selection = GroupSelection(num_groups, request.drop)
            count.num_asked = count.num_done = 0
            versions: set[int] = set()
            for prompts in request.rounds:
                groups, last_token = await self.run(prompts, request, count)
                versions |= {rollout.weight_version for group in groups for rollout in group}
                selection.add(groups)
                if selection.is_full:
                    break
            if len(versions) <= 1:
                done = time.monotonic()
                return selection, RolloutTimes(
                    generate_s=last_token - began, reward_s=done - last_token
                )
            # Every engine was lost and the survivors got newer weights: a batch has one version.

    async def run(
        self, prompts: Sequence[Prompt], request: RolloutRequest, count: RolloutCount
    ) -> tuple[list[list[Rollout]], float]:
        """A group of scored rollouts for each prompt, and when the last token came; `count` counts
        them."""
        size = request.num_samples
        count.num_asked += len(prompts) * size
        settings = GenerationSettings(
            temperature=request.temperature,
            top_p=request.top_p,
            max_response_tokens=request.max_response_tokens,
            stop_token_ids=self._scorer.stop_token_ids,
        )
        last_token = time.monotonic()

        async def one(members: list[tuple[Prompt, int]]) -> list[Rollout]:
            nonlocal last_token
            seeds = [
                request_seed(self._run_seed, request.step, prompt.id, sample)
                for prompt, sample in members
            ]
            episodes = await self._runner.run([prompt for prompt, _ in members], seeds, settings)
            last_token = time.monotonic()
            scored = await self._scorer.score(members, episodes)
            count.num_done += len(scored)
            return scored

        jobs = jobs_of(prompts, size)
        if self._runner.in_lockstep:  # which batches there are must not depend on when a job ends
            jobs = [[member for job in jobs for member in job]]
        parts = await together(map(one, jobs))
        rollouts = [rollout for part in parts for rollout in part]
        return [rollouts[at : at + size] for at in range(0, len(rollouts), size)], last_token


def jobs_of(prompts: Sequence[Prompt], num_samples: int) -> list[list[tuple[Prompt, int]]]:
    """Cut a round into engine calls of (prompt, sample) pairs, in order; siblings stay together
    (they share the prompt's keys and values)."""
    prompts_per_job = max(1, ROLLOUTS_PER_CALL // num_samples)
    return [
        [
            (prompt, sample)
            for prompt in prompts[start : start + prompts_per_job]
            for sample in range(num_samples)
        ]
        for start in range(0, len(prompts), prompts_per_job)
    ]
