"""An agent of one's own as the environment: what its session and its answer make of an episode.

Endpoint, clients and threads are real, `generate` is scripted. Not exercised: engines
(tests/e2e/test_agent.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import own_agents
import pytest
from made.configs import run_config
from made.endpoint import END, Says
from made.tool_templates import tool_tokenizer

from sfpo_megatron.config.rules.agent import agent as agent_rule
from sfpo_megatron.plugins import PluginError
from sfpo_megatron.rollout.endpoint.session import Session
from sfpo_megatron.rollout.environments.agent import AgentEnvironment
from sfpo_megatron.rollout.episodes import Episode
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.types import Prompt

PROMPT = Prompt(id="p/0", text="", token_ids=(5, 6, 7), question="How many?", answer="4")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tool_tokenizer()


@contextlib.contextmanager
def environment_of(tokenizer: Any, agent: str, **args: Any) -> Iterator[AgentEnvironment]:
    made = AgentEnvironment(tokenizer, agent=f"{own_agents.__name__}:{agent}", **args)
    try:
        yield made
    finally:
        made.close()


def play(tokenizer: Any, agent: str, *turns: str, context: int = 10_000, **args: Any) -> Episode:
    says = Says(tokenizer, *(f"{turn}{END}" for turn in turns), context_tokens=context)
    with environment_of(tokenizer, agent, **args) as environment:
        return asyncio.run(environment.run(PROMPT, says, 3))


def said_by_model(tokenizer: Any, episode: Episode) -> str:
    masked = zip(episode.token_ids, episode.response_mask, strict=True)
    return str(tokenizer.decode([token for token, is_said in masked if is_said]))


def test_an_agent_plays_an_episode(tokenizer: Any) -> None:
    """Its own messages stand in place of the prompt; the last turn is scored."""
    episode = play(tokenizer, "polite", "4", "5", agent_args={"end": "And then?"})
    prompt = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(episode.prompt_token_ids) == prompt
    assert said_by_model(tokenizer, episode) == f"4{END}5{END}"
    assert "And then?" in tokenizer.decode(episode.token_ids)
    assert tokenizer.decode(episode.token_ids[episode.scored_from :]) == f"5{END}"
    assert episode.finished and episode.reward is None
    assert episode.metrics == {
        "turns": 2, "requests": 2, "branches": 1,
        "stop_answered": 1, "stop_length": 0, "stop_timeout": 0, "stop_error": 0,
    }  # fmt: skip


def test_what_it_returns_is_reward_and_metrics(tokenizer: Any) -> None:
    assert play(tokenizer, "number", "0.5").reward == 0.5
    episode = play(tokenizer, "measured", "0.25")
    assert episode.reward == 0.25
    assert (episode.metrics["seed"], episode.metrics["length"]) == (3.0, 4.0)
    with pytest.raises(ValueError, match="an agent returned str, expected a number, a mapping"):
        play(tokenizer, "text", "0.25")


def test_no_proxy_stands_between(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert play(tokenizer, "number", "1").reward == 1.0
    assert os.environ["no_proxy"] == "example.org,127.0.0.1"


def test_the_branch_of_the_last_turn_is_trained_on(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    episode = play(tokenizer, "forgetful", "a", "b")
    assert said_by_model(tokenizer, episode) == f"b{END}"
    assert (episode.metrics["branches"], episode.metrics["requests"]) == (2, 2)
    assert "an agent rewrote its history: request 2 kept 0 messages" in caplog.text


def test_a_hanging_agent_costs_its_limit(tokenizer: Any) -> None:
    """The episode is what was said, without an answer."""
    began = time.monotonic()
    episode = play(tokenizer, "hangs", "4", timeout_s=1.0)
    assert 1.0 <= time.monotonic() - began < 10
    assert said_by_model(tokenizer, episode) == f"4{END}"
    assert episode.metrics["stop_timeout"] == 1 and not episode.finished
    assert episode.scored_from == len(episode.token_ids)


def test_an_agent_that_cancels_itself_has_not_taken_too_long(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    episode = play(tokenizer, "cancels_itself", "4")
    assert episode.metrics["stop_error"] == 1 and not episode.finished
    assert episode.metrics["stop_timeout"] == 0
    assert "an agent raised CancelledError" in caplog.text


def test_no_room_for_another_turn(tokenizer: Any) -> None:
    episode = play(tokenizer, "endless", *["a"] * 9, context=300)
    assert episode.metrics["stop_length"] == 1 and not episode.finished
    assert 1 < episode.metrics["turns"] < 9
    assert len(episode.prompt_token_ids) + len(episode.token_ids) <= 300


def test_an_agent_that_raises(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """After a turn of the model: it costs the episode. Before: it ends the run."""
    episode = play(tokenizer, "raises_late", "4")
    assert episode.metrics["stop_error"] == 1 and not episode.finished
    assert "an agent raised LookupError: no such page" in caplog.text
    with pytest.raises(LookupError, match="no such page"):
        play(tokenizer, "raises_early")
    with pytest.raises(ValueError, match=r"own_agents:silent ended without a turn of the model"):
        play(tokenizer, "silent")


@pytest.mark.parametrize(("agent", "reward"), [("impatient", None), ("gives_up", 0.0)])
def test_a_response_slower_than_the_client_waits_costs_the_episode(
    tokenizer: Any, agent: str, reward: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has spoken, though nobody listened: that is no fault of the agent's program."""
    gone = threading.Event()

    class Slow(Says):
        async def __call__(self, *args: Any, **more: Any) -> Any:
            while not gone.is_set():
                await asyncio.sleep(0.01)
            return await super().__call__(*args, **more)

        def branch(self, number: int) -> Says:
            return self

    says = Slow(tokenizer, f"4{END}", f"5{END}", context_tokens=10_000)
    with environment_of(tokenizer, agent) as environment:
        plays = environment.play

        async def play_and_go(*args: Any) -> Any:
            try:
                return await plays(*args)
            finally:
                gone.set()

        monkeypatch.setattr(environment, "play", play_and_go)
        episode = asyncio.run(environment.run(PROMPT, says, 3))
    assert not episode.finished and episode.reward == reward
    assert said_by_model(tokenizer, episode) in (f"4{END}", f"5{END}")
    assert episode.scored_from == len(episode.token_ids)
    assert (episode.metrics["turns"], episode.metrics["stop_error"]) == (0, 1)


def test_an_agent_that_exits_ends_its_own_episode_alone(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that play beside it and after it have their answers."""
    with environment_of(tokenizer, "leaves_with_3") as environment:

        async def all_of(*seeds: int) -> list[Episode]:
            says = (Says(tokenizer, f"4{END}") for _ in seeds)
            runs = (environment.run(PROMPT, one, s) for one, s in zip(says, seeds, strict=True))
            return await asyncio.gather(*runs)

        first, left, last = asyncio.run(asyncio.wait_for(all_of(1, 3, 4), 60))
        (after,) = asyncio.run(asyncio.wait_for(all_of(5), 60))
    assert [episode.reward for episode in (first, left, last, after)] == [4.0, None, 4.0, 4.0]
    assert left.metrics["stop_error"] == 1 and "SystemExit: no licence" in caplog.text


def test_blocking_clients_take_turns(tokenizer: Any) -> None:
    """And the loop that asked goes on meanwhile."""

    async def many() -> list[Episode]:
        with_numbers = [Says(tokenizer, f"{index}{END}") for index in range(8)]
        runs = [environment.run(PROMPT, says, 3) for says in with_numbers]
        made = asyncio.ensure_future(asyncio.gather(*runs))
        ticks = 0
        while not made.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 10
        return await made

    with environment_of(tokenizer, "blocks") as environment:
        episodes = asyncio.run(many())
    assert [episode.reward for episode in episodes] == list(range(8))


class Fails(Says):
    async def __call__(self, *args: Any, **more: Any) -> Any:
        raise RolloutError("engine 0 was lost for good")


def test_what_engines_raise_ends_the_episode_at_once(tokenizer: Any) -> None:
    """Whatever the agent does about it."""
    began = time.monotonic()
    with (
        environment_of(tokenizer, "swallows") as environment,
        pytest.raises(RolloutError, match="lost for good"),
    ):
        asyncio.run(environment.run(PROMPT, Fails(tokenizer), 3))
    assert time.monotonic() - began < 20


def test_cancelling_an_episode_ends_its_agent(tokenizer: Any) -> None:
    async def cancelled() -> None:
        episode = asyncio.create_task(environment.run(PROMPT, Says(tokenizer, f"4{END}"), 3))
        while not own_agents.hanging:
            await asyncio.sleep(0.01)
        episode.cancel()
        while own_agents.hanging:
            await asyncio.sleep(0.01)

    with environment_of(tokenizer, "hangs") as environment:
        asyncio.run(asyncio.wait_for(cancelled(), 30))


@pytest.mark.parametrize("when", ["agent plays", "session closes"])
def test_cancelling_an_episode_frees_the_engines(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Also where the agent has ended without a turn, and what the model says is waited for."""
    closes = threading.Event()
    close = Session.close

    async def closing(session: Session) -> None:
        closes.set()
        await close(session)

    monkeypatch.setattr(Session, "close", closing)

    class Endless(Says):
        is_cancelled = False

        async def __call__(self, *args: Any, **more: Any) -> Any:
            self.asked.append(())
            try:
                await asyncio.sleep(60)
            finally:
                self.is_cancelled = True

    async def cancelled() -> None:
        episode = asyncio.create_task(environment.run(PROMPT, says, 3))
        while not (says.asked if when == "agent plays" else closes.is_set()):
            await asyncio.sleep(0.01)
        episode.cancel()
        while not says.is_cancelled:
            await asyncio.sleep(0.01)

    says = Endless(tokenizer)
    agent = "number" if when == "agent plays" else "impatient"
    with environment_of(tokenizer, agent) as environment:
        asyncio.run(asyncio.wait_for(cancelled(), 30))


@pytest.mark.parametrize(
    ("agent", "args", "message"),
    [
        ("not_async", {}, r"rollout.environment_args.agent: found own_agents:not_async, which is"),
        ("no_seed", {}, r"cannot be called with \(base_url, api_key, prompt, seed\)"),
        ("nothing", {}, "nothing that can be called 'nothing'"),
        ("polite", {"agent_args": {"ende": 1}}, "agent_args: found ende, with which own_agents"),
    ],
)  # fmt: skip
def test_what_is_no_agent_is_refused(
    tokenizer: Any, agent: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message), environment_of(tokenizer, agent, **args):
        pass


def problems(args: dict[str, Any], chat_template: bool = True, **rollout: Any) -> list[str]:
    config = run_config(
        rollout={"environment": "agent", "environment_args": args, **rollout},
        data={"chat_template": chat_template},
    )
    return [f"{problem.key}: {problem.message}" for problem in agent_rule(config)]


POLITE = {"agent": "own_agents:polite"}


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        ({}, {}, "rollout.environment_args.agent: found nothing, expected a string"),
        ({"agent": "mine"}, {}, "found 'mine', expected package.module:name"),
        ({"agent": "own_agents:nothing"}, {}, "nothing that can be called 'nothing'"),
        ({**POLITE, "timeout_s": 0}, {}, "timeout_s: found 0.0, expected a"),
        (POLITE, {"reproducible": True}, "rollout.reproducible: found true"),
        (POLITE, {"chat_template": False}, "data.chat_template: found false with rollout.env"),
    ],
)
def test_check_names_what_is_wrong(
    args: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    (found,) = problems(args, **more)
    assert re.search(message, found), found


def test_check_is_silent_where_nothing_is() -> None:
    assert not problems(POLITE)
    assert not list(agent_rule(run_config(rollout={"reproducible": True})))
