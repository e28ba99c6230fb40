"""Scores responses, each by the reward of its prompt's source: a function, or a sum of several.

Functions run in the processes of `workers.py`; `http` is a server of the user's own (`http.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sfpo_megatron.config.reward import RewardChoice, RewardConfig, WeightedReward
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards import VerifierError
from sfpo_megatron.rewards.http import HTTP, HttpScorer
from sfpo_megatron.rewards.scores import Item, Outcome, Request, Score, weighted_sum
from sfpo_megatron.rewards.workers import WorkerPool

__all__ = ["Item", "Outcome", "Score", "ScoringPool", "VerifierError"]


class ScoringPool:
    """What the rewards of a run need, started when the pool is made."""

    def __init__(
        self,
        config: RewardConfig,
        run: RunDirectory | None = None,
        *,
        rewards: Iterable[RewardChoice | None] = (None,),
        explain: bool = False,
    ) -> None:
        """`run`: where what the scoring processes print is logged; None for stderr. `rewards`:
        those that `score` will be asked for; None is reward.function. `explain`: scores say how
        response and reference were read."""
        self._config = config
        functions = config.functions(rewards)
        in_processes = [one for one in functions if one.name != HTTP]
        self._http = HttpScorer(config.http) if len(in_processes) < len(functions) else None
        try:
            self._workers = (
                WorkerPool(config, in_processes, run, explain=explain) if in_processes else None
            )
        except BaseException:
            if self._http is not None:
                self._http.close()
            raise
        # Beside the processes, and for calls in several threads: a server may take its time.
        self._beside = ThreadPoolExecutor(
            config.http.concurrency, thread_name_prefix="scoring-beside"
        )

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [] if self._workers is None else self._workers.pids

    def score(
        self, items: Sequence[Item], rewards: Sequence[RewardChoice | None] | None = None
    ) -> list[Score]:
        """A score for each (prompt, response), in their order; VerifierError where there can be
        none. `rewards`: the reward of each; None is reward.function."""
        scores: list[Score] = []
        for outcome in self.outcomes(items, rewards):
            if isinstance(outcome, VerifierError):
                raise outcome
            scores.append(outcome)
        return scores

    def outcomes(
        self, items: Sequence[Item], rewards: Sequence[RewardChoice | None] | None = None
    ) -> list[Outcome]:
        """Scores as `score` gives them, and the error in the place of an item without one."""
        choices = [None] * len(items) if rewards is None else rewards
        numbers: dict[WeightedReward, list[int]] = {}
        for number, choice in enumerate(choices):
            for summand in self._config.summands(choice):
                numbers.setdefault(summand, []).append(number)
        requests = [
            Request(function=function, items=[items[number] for number in its])
            for function, its in numbers.items()
        ]
        found: dict[tuple[WeightedReward, int], Outcome] = {}
        for request, outcomes in zip(requests, self._scored(requests), strict=True):
            for number, outcome in zip(numbers[request.function], outcomes, strict=True):
                found[request.function, number] = outcome
        return [
            self._combined(choice, [found[s, number] for s in self._config.summands(choice)])
            for number, choice in enumerate(choices)
        ]

    def _combined(self, choice: RewardChoice | None, outcomes: Sequence[Outcome]) -> Outcome:
        scores: list[Score] = []
        for outcome in outcomes:
            if isinstance(outcome, VerifierError):
                return outcome
            scores.append(outcome)
        choice = self._config.function if choice is None else choice
        return scores[0] if isinstance(choice, str) else weighted_sum(choice, scores)

    def _scored(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        local = [request for request in requests if request.function.name != HTTP]
        remote = [request for request in requests if request.function.name == HTTP]
        posted = [self._beside.submit(self._post, request.items) for request in remote]
        scored = [] if self._workers is None else self._workers.score(local)
        here, there = iter(scored), (future.result() for future in posted)
        return [next(there if request.function.name == HTTP else here) for request in requests]

    def _post(self, items: Sequence[Item]) -> list[Outcome]:
        assert self._http is not None, "a reward that the pool was not made for"
        return self._http.score(items)

    def close(self) -> None:
        """End the processes, and what is posted."""
        if self._http is not None:
            self._http.close()
        self._beside.shutdown()
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
