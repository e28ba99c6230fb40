"""The controller's requests, beside rounds and a fleet that are stand-ins: no Ray, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config
from made.rollouts import group

from sfpo_megatron.rollout.controller import RolloutController
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.reports import EngineLoad, RolloutCount, ScoredRequest
from sfpo_megatron.rollout.rounds import Rounds
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.types import Prompt, Rollout

PROMPTS = tuple(
    Prompt(id=name, text="", token_ids=(1,), question="", answer="") for name in ("a", "b")
)
REQUEST = RolloutRequest(
    id="train/3",
    step=3,
    prompts=PROMPTS,
    num_samples=2,
    temperature=1.0,
    top_p=1.0,
    max_response_tokens=4,
)


async def no_load() -> EngineLoad:
    return EngineLoad.of_all([])


class Answered(Rounds):
    """Each round is answered by the next of `versions`, as (version of a, version of b)."""

    def __init__(self, versions: Sequence[tuple[int, int]]) -> None:
        none: Any = None
        super().__init__(0, runner=none, scorer=none)
        self.versions = list(versions)

    async def run(
        self, prompts: Sequence[Prompt], request: RolloutRequest, count: RolloutCount
    ) -> tuple[list[list[Rollout]], float]:
        count.num_asked += len(prompts) * request.num_samples
        await asyncio.sleep(0)
        count.num_done += len(prompts) * request.num_samples
        versions = self.versions.pop(0)
        return [
            group(prompt.id, [0.0, 1.0], weight_version=version)
            for prompt, version in zip(prompts, versions, strict=True)
        ], 0.0


class Alone(RolloutController):
    """Its rounds are those of `Answered`."""

    def __init__(self, *versions: tuple[int, int]) -> None:
        self.answered = self._rounds = Answered(versions)
        self._config = run_config(rollout={"max_response_tokens": 4})
        self._fleet: Any = SimpleNamespace(
            check=lambda: None,
            wants_weights=False,
            change=lambda: asyncio.sleep(60),
            can_generate=True,
            take_load=no_load,
            starting=(),
            num_reissued=0,
            num_restarts=0,
        )
        self._requests: dict[str, asyncio.Task[ScoredRequest]] = {}
        self._counts: dict[str, RolloutCount] = {}
        self._updating = False


def rollouts_of(controller: Alone) -> list[Rollout]:
    async def ask() -> ScoredRequest | None:
        await controller.submit(REQUEST)
        with pytest.raises(RolloutError, match="already submitted"):
            await controller.submit(REQUEST)
        return await controller.collect(REQUEST.id)

    found = asyncio.run(ask())
    assert found is not None
    return found.rollouts


def test_progress_is_of_the_round_that_counts() -> None:
    """What was made by several versions is made again, and counted again."""
    controller = Alone((0, 1), (2, 2))

    async def ask() -> list[tuple[int, int]]:
        found = []
        await controller.submit(REQUEST)
        is_done = False
        while not is_done:
            is_done = controller._requests[REQUEST.id].done()
            count = (await controller.progress(REQUEST.id)).count
            found.append((count.num_done, count.num_asked))
            await asyncio.sleep(0)
        await controller.collect(REQUEST.id)
        assert (await controller.progress(REQUEST.id)).count == RolloutCount()
        return found

    assert set(asyncio.run(ask())) == {(0, 0), (0, 4), (4, 4)}


def test_a_batch_has_one_version() -> None:
    """Every engine was lost between two groups, and the others had newer weights: all is made
    again, until it is of one."""
    controller = Alone((0, 1), (1, 2), (2, 2))
    rollouts = rollouts_of(controller)
    assert [r.prompt_id for r in rollouts] == ["a", "a", "b", "b"]
    assert {r.weight_version for r in rollouts} == {2} and not controller.answered.versions


def test_what_is_of_one_version_is_made_once() -> None:
    controller = Alone((1, 1), (2, 2))
    assert {r.weight_version for r in rollouts_of(controller)} == {1}
    assert controller.answered.versions == [(2, 2)]


def test_no_refit_while_a_request_generates() -> None:
    """But engines that were restarted get the current weights at any time."""

    async def refit(only_stale: bool) -> list[int]:
        controller, begun = Alone((1, 1)), list[int]()

        async def start_update(version: int, *, only_stale: bool) -> None:
            begun.append(version)

        controller._fleet.start_update = start_update
        await controller.submit(REQUEST)
        await controller.start_weight_update(4, only_stale)
        return begun

    with pytest.raises(RolloutError, match=r"train/3 is still generating"):
        asyncio.run(refit(False))
    assert asyncio.run(refit(True)) == [4]
