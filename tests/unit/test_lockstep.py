"""Episodes under rollout.reproducible: which calls form a batch, and what is refused.

Engines are a stand-in that answers by prompt and seed. Not exercised: that equal batches give equal
bits (tests/e2e/test_lockstep.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import lockstep_environments
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_environments import Paced
from made.episodes import SETTINGS, Engines, complete, prompt_of, runner_of

from sfpo_megatron.rollout.episodes import Episode
from sfpo_megatron.rollout.errors import FleetLost, RolloutError
from sfpo_megatron.rollout.reports import RolloutCount
from sfpo_megatron.rollout.rounds import Rounds
from sfpo_megatron.rollout.sampling import (
    ROLLOUTS_PER_CALL,
    Completion,
    RolloutRequest,
    call_seed,
    request_seed,
)
from sfpo_megatron.types import Prompt

OWN = lockstep_environments.__name__


def prompts_of(turns: Sequence[int]) -> list[Prompt]:
    return [prompt_of(f"p/{i}", count, i + 1) for i, count in enumerate(turns)]


def play(
    name: str, prompts: Sequence[Prompt], fleet: Engines, *, within_s: float = 5.0
) -> list[tuple[Episode, int]]:
    async def played() -> list[tuple[Episode, int]]:
        runner = runner_of(f"{OWN}:{name}", fleet, reproducible=True)
        assert runner.in_lockstep
        seeds = [100 * (i + 1) for i in range(len(prompts))]
        async with asyncio.timeout(within_s):
            return await runner.run(prompts, seeds, SETTINGS)

    Paced.ended.clear()
    return asyncio.run(played())


def batches_of(turns: Sequence[int]) -> list[list[tuple[tuple[int, ...], int]]]:
    """(context, seed) of each call, batch after batch, by a loop over turns instead of tasks."""
    contexts = [list(prompt.token_ids) for prompt in prompts_of(turns)]
    batches = []
    for turn in range(max(turns)):
        batch = []
        for i, context in enumerate(contexts):
            if turn < turns[i]:
                seed = call_seed(100 * (i + 1), turn)
                batch.append((tuple(context), seed))
                context += [*complete(tuple(context), seed, 1).token_ids, turn]
        batches.append(batch)
    return batches


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), st.randoms())
def test_batches_are_the_same_however_long_the_pauses(turns: list[int], random: Any) -> None:
    """Call n of all episodes that have one, in their order; the pauses before the calls shuffle
    when each of them comes."""
    Paced.pauses = {
        (f"p/{i}", turn): random.choice([0.0, 0.001, 0.003])
        for i, count in enumerate(turns)
        for turn in range(count)
    }
    fleet = Engines()
    found = play("Paced", prompts_of(turns), fleet)
    Paced.pauses = {}
    asked = [list(zip(prompts, seeds, strict=True)) for prompts, seeds, _ in fleet.calls]
    assert asked == batches_of(turns)
    assert {s.max_response_tokens for _, _, each in fleet.calls for s in each} == {1}
    assert [len(episode.token_ids) for episode, _ in found] == [2 * count for count in turns]
    assert {version for _, version in found} == {5}


def test_many_calls_are_handed_over_in_parts() -> None:
    """An engine's call is of a bounded size: it has a time limit."""
    fleet, count = Engines(), 2 * ROLLOUTS_PER_CALL + 3
    play("Paced", prompts_of([2] * count), fleet)
    sizes = [len(prompts) for prompts, _, _ in fleet.calls]
    assert sizes == [ROLLOUTS_PER_CALL, ROLLOUTS_PER_CALL, 3] * 2
    asked = [call for part in fleet.calls for call in zip(*part[:2], strict=True)]
    assert asked == [call for batch in batches_of([2] * count) for call in batch]


def test_who_is_long_in_a_tool_is_waited_for() -> None:
    Paced.pauses = {("p/1", 1): 0.2}
    fleet = Engines()
    play("Paced", prompts_of([2, 2, 3]), fleet)
    Paced.pauses = {}
    assert [len(prompts) for prompts, _, _ in fleet.calls] == [3, 3, 1]
    with pytest.raises(TimeoutError):
        play("Hangs", prompts_of([1, 1]), fleet, within_s=0.1)
    assert len(fleet.calls) == 3, "it went on without the other"


def test_one_that_raises_ends_the_others_without_another_batch() -> None:
    fleet = Engines()
    with pytest.raises(RolloutError, match=r"raised LookupError: no such tool on prompt p/1;"):
        play("Fails", prompts_of([3, 3, 3]), fleet)
    assert Paced.ended == ["p/0", "p/2"] and len(fleet.calls) == 1


def test_one_that_stops_waiting_is_asked_for_again() -> None:
    """Its first call is in no batch; the other one is not held up."""
    fleet = Engines()
    play("Impatient", prompts_of([1, 1]), fleet)
    assert [prompts for prompts, _, _ in fleet.calls] == [[(1, 1), (8,)]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Branches", r"^rollout\.reproducible: found a call of `generate\.branch`, expected none"),
        ("AtOnce", r"^rollout\.reproducible: found a second call of `generate` beside another"),
    ],
)
def test_what_leaves_the_batches_to_chance_is_refused(name: str, message: str) -> None:
    fleet = Engines()
    with pytest.raises(RolloutError, match=message):
        play(name, prompts_of([1, 1]), fleet)
    assert len(fleet.calls) <= (name == "AtOnce"), "it went on"  # the first two may be answered


def test_engines_lost_for_good_end_it() -> None:
    class Lost(Engines):
        async def generate(self, *call: Any) -> tuple[list[Completion], int]:
            raise FleetLost("engine 0 died")

    with pytest.raises(FleetLost, match=r"^engine 0 died$"):
        play("Paced", prompts_of([1, 2]), Lost())
    assert sorted(Paced.ended) == ["p/0", "p/1"]


def test_all_begin_again_under_newer_weights() -> None:
    """Also those that had ended: the batches are those of a run that had these weights."""

    class Refitted(Engines):
        async def generate(self, *call: Any) -> tuple[list[Completion], int]:
            answer = await super().generate(*call)
            self.version = 6
            return answer

    fleet, straight = Refitted(), Engines(6)
    found = play("Paced", prompts_of([1, 3, 2]), fleet)
    assert found == play("Paced", prompts_of([1, 3, 2]), straight)
    assert fleet.calls == straight.calls * 2


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_round_is_played_whole(reproducible: bool) -> None:
    """Not job by job, whose calls would come in the order in which they happen to end."""

    class Scores:
        stop_token_ids = (1,)

        async def score(self, members: list[Any], episodes: list[Any]) -> list[Any]:
            return list(members)

    fleet, prompts = Engines(), prompts_of([2] * 5)
    runner = runner_of(f"{OWN}:Paced", fleet, reproducible=reproducible)
    request = RolloutRequest(
        id="r", step=1, prompts=tuple(prompts), num_samples=8, temperature=1.0, top_p=1.0,
        max_response_tokens=10,
    )  # fmt: skip
    rounds = Rounds(3, runner, Scores())  # type: ignore[arg-type]
    groups, _ = asyncio.run(rounds.run(prompts, request, RolloutCount()))
    order = [(prompt, sample) for prompt in prompts for sample in range(8)]
    assert [member for group in groups for member in group] == order
    seeds = [request_seed(3, 1, prompt.id, sample) for prompt, sample in order]
    sizes = [16, 16, 8] * 2 if reproducible else [1] * 80
    assert [len(prompts) for prompts, _, _ in fleet.calls] == sizes
    if reproducible:
        assert [seed for _, seeds, _ in fleet.calls for seed in seeds][:40] == seeds


def test_one_generation_each_needs_no_barrier() -> None:
    assert not runner_of("single_turn", Engines(), reproducible=True).in_lockstep
    assert not runner_of(f"{OWN}:Paced", Engines()).in_lockstep
