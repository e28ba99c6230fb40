"""Branches of an episode, rewards of its turns, what is scored of it, and settings.

Engines are a stand-in that answers by prompt and seed, as in test_episodes.py. Not exercised: the
controller's actor.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import own_environments
import pytest
from made.configs import run_config
from made.episodes import SETTINGS, Engines, WordTokenizer, complete, prompt_of, run, runner_of
from made.fleets import Actor, calls_of, make_fleet
from made.tool_templates import tool_tokenizer

from sfpo_megatron.plugins import PluginError
from sfpo_megatron.rollout.episode_runner import EpisodeRunner
from sfpo_megatron.rollout.episodes import Episode, check_environment
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.sampling import Completion
from sfpo_megatron.rollout.scoring import Scorer, metrics_of
from sfpo_megatron.types import Rollout

OWN = own_environments.__name__


def test_branches_have_seeds_of_their_own_whatever_ends_first() -> None:
    """Two branches of two calls each beside one another, and the main line: the engines answer the
    branches in either order, and each call has the same seed."""

    class Slow(Engines):
        def __init__(self, slow: int) -> None:
            super().__init__()
            self.slow = slow

        async def generate(self, *call: Any) -> tuple[list[Completion], int]:
            if call[0][0][0] == self.slow:
                await asyncio.sleep(0.02)
            return await super().generate(*call)

    found = []
    for slow in (1, 2):
        fleet = Slow(slow)
        ((episode, _),) = run(f"{OWN}:Branches", [prompt_of("p/0", 7)], fleet)
        seeds = {tokens: seed for (tokens,), (seed,), _ in fleet.calls}
        found.append((seeds, episode))
        assert [tokens[0] for (tokens,), _, _ in fleet.calls][-1:] == [7]
    assert found[0] == found[1]
    assert len(set(found[0][0].values())) == 5


def test_rewards_of_turns_are_added() -> None:
    ((episode, _),) = run(f"{OWN}:Rewarded", [prompt_of("p/0", 7)], Engines())
    assert episode.turn_rewards == 0.75 and episode.reward is None
    assert metrics_of(episode) == {"turn_rewards": 0.75}
    assert metrics_of(replace(episode, reward=0.5))["reward"] == 0.5
    with pytest.raises(RolloutError, match="found nan as turn_rewards, expected a finite number"):
        run(f"{OWN}:Returns", [prompt_of("turns", 7)], Engines())


def test_what_is_scored_begins_where_the_environment_says(tmp_path: Path) -> None:
    """The whole text is shown, its end is scored; a reward of a turn is added to the verifier's,
    and does not make a response correct."""
    tokenizer = tool_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    reward = {"function": "exact_match", "num_workers": 1}
    scorer = Scorer(run_config(output_dir=str(tmp_path), reward=reward), str(tmp_path / "model"))
    ids = tuple(tokenizer("34", add_special_tokens=False)["input_ids"])
    episode = Episode(token_ids=ids, logprobs=(0.0, 0.0), response_mask=(True, True))
    episodes = [
        replace(episode, scored_from=1),
        episode,
        replace(episode, scored_from=2, turn_rewards=0.25),
        replace(episode, reward=1.0, turn_rewards=-0.25),
    ]
    prompts = [replace(prompt_of(f"p/{i}", 7), answer=answer) for i, answer in enumerate("4479")]

    async def rollouts() -> list[Rollout]:
        await scorer.start()
        members = [(prompt, 0) for prompt in prompts]
        try:
            return await scorer.score(members, [(one, 0) for one in episodes])
        finally:
            await scorer.close()

    found = asyncio.run(rollouts())
    assert [rollout.text for rollout in found] == ["34"] * 4
    assert [rollout.scored_text for rollout in found] == ["4", "34", "", "34"]
    assert [rollout.reward for rollout in found] == [1.0, 0.0, 0.25, 0.75]
    assert [rollout.correct for rollout in found] == [True, False, False, True]
    assert [rollout.metrics for rollout in found[1:]] == [
        {},
        {"turn_rewards": 0.25},
        {"reward": 1.0, "turn_rewards": -0.25},
    ]


def test_settings_reach_the_class_and_only_those_that_it_takes() -> None:
    arguments = {"environment": f"{OWN}:Settings", "environment_args": {"size": 3}}
    config = run_config(
        rollout=arguments,
        data={"chat_template": True, "chat_template_args": {"enable_thinking": False}},
    )
    check_environment(config)
    with pytest.raises(PluginError, match=r"^data\.chat_template: found false with rollout\.env"):
        check_environment(run_config(rollout=arguments))
    runner = EpisodeRunner(config, WordTokenizer(), Engines())
    assert own_environments.Settings.made == (3, {"enable_thinking": False})
    runner.close()
    assert own_environments.Settings.made == ()
    runner_of("single_turn", Engines()).close()
    for name in (f"{OWN}:Settings", "single_turn"):
        wrong = run_config(rollout={"environment": name, "environment_args": {"sise": 3}})
        message = rf"^rollout\.environment_args: found sise, with which {name} cannot be made"
        with pytest.raises(PluginError, match=message):
            check_environment(wrong)


# ---- engines that are lost ---------------------------------------------------------------------


class Answering(Actor):
    """An engine that answers by prompt and seed; the one whose `dies_at` calls are over dies."""

    dies_at: ClassVar[dict[int, int]] = {}

    async def answer(self, name: str, *args: Any) -> Any:
        if name != "generate":
            return await super().answer(name, *args)
        prompts, seeds, settings = args
        await asyncio.sleep(0.001)
        if len(calls_of(self, "generate")) >= self.dies_at.get(self.index, 99):
            del self.dies_at[self.index]
            self.dead.set()
        asked = zip(prompts, seeds, settings, strict=True)
        return [complete(p, seed, s.max_response_tokens) for p, seed, s in asked]


@pytest.mark.parametrize("dies_at", [{}, {0: 1}, {1: 5}, {0: 4, 1: 8}])
def test_an_engine_that_is_killed_in_mid_episode_costs_no_episode(
    monkeypatch: pytest.MonkeyPatch, actors: list[Actor], dies_at: dict[int, int]
) -> None:
    """Its calls are made again with their seeds: as many episodes, and the same ones."""
    monkeypatch.setattr(Answering, "dies_at", dict(dies_at))
    prompts = [prompt_of(f"p/{i}", 7, i) for i in range(6)]
    seeds = [100 * (i + 1) for i in range(6)]

    async def episodes() -> list[tuple[Episode, int]]:
        fleet = make_fleet(actors, Answering)
        await fleet.start()
        try:
            async with asyncio.timeout(20):
                return await runner_of(f"{OWN}:Turns", fleet).run(prompts, seeds, SETTINGS)
        finally:
            assert fleet.num_restarts == len(dies_at)
            assert (fleet.num_reissued > 0) == bool(dies_at)
            await fleet.shutdown()

    found = asyncio.run(episodes())
    wanted = run(f"{OWN}:Turns", prompts, Engines(0))
    assert found == wanted
