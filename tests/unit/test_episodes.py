"""The environment seam: who is called with what, what becomes of an episode, and what is refused.

Engines are a stand-in that answers by prompt and seed. Not exercised: real ones, the controller's
actor (tests/e2e/test_environment.py).
"""

from __future__ import annotations

import asyncio
import math
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_environments
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made.configs import run_config
from made.episodes import (
    SETTINGS,
    Call,
    Engines,
    WordTokenizer,
    complete,
    prompt_of,
    run,
    runner_of,
)

from sfpo_megatron.batching import BatchLayout, build_minibatches
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.rules.plugins import own_code
from sfpo_megatron.plugins import ENVIRONMENT, PluginError
from sfpo_megatron.rollout import controller
from sfpo_megatron.rollout.episodes import Episode, load_environment
from sfpo_megatron.rollout.errors import FleetLost, RolloutError
from sfpo_megatron.rollout.reports import RolloutCount, environment_metrics
from sfpo_megatron.rollout.rounds import Rounds, jobs_of
from sfpo_megatron.rollout.sampling import (
    Completion,
    GenerationSettings,
    RolloutRequest,
    call_seed,
    request_seed,
)
from sfpo_megatron.types import Prompt, Rollout, RolloutBatch

EXAMPLE = Path(__file__).parents[2] / "examples" / "your_own"


# ---- single_turn: what it was before there were environments -----------------------------------


class Scores:
    """The scorer, as far as a round needs it."""

    stop_token_ids = (1,)

    async def score(
        self, members: Sequence[tuple[Prompt, int]], episodes: Sequence[tuple[Episode, int]]
    ) -> list[Rollout]:
        return [
            Rollout(
                prompt_id=prompt.id, sample=sample, prompt_token_ids=prompt.token_ids,
                token_ids=episode.token_ids, generator_logprobs=episode.logprobs,
                response_mask=episode.response_mask, finished=episode.finished, text="",
                reward=0.0, correct=False, weight_version=version,
            )
            for (prompt, sample), (episode, version) in zip(members, episodes, strict=True)
        ]  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
def test_single_turn_makes_the_same_calls_and_rollouts(
    num_prompts: int, num_samples: int, limit: int, step: int
) -> None:
    """One call of an engine for each job, with the prompts' tokens, a seed a sample, and the
    request's settings; each rollout is its completion, all of it trained on."""
    prompts = [prompt_of(f"p/{i}", *range(1, i + 3)) for i in range(num_prompts)]
    request = RolloutRequest(
        id="r", step=step, prompts=tuple(prompts), num_samples=num_samples, temperature=0.7,
        top_p=0.9, max_response_tokens=limit,
    )  # fmt: skip
    wanted_settings = GenerationSettings(
        temperature=0.7, top_p=0.9, max_response_tokens=limit, stop_token_ids=(1,)
    )
    fleet = Engines()
    rounds = Rounds(3, runner_of("single_turn", fleet), Scores())  # type: ignore[arg-type]
    count = RolloutCount()
    groups, _ = asyncio.run(rounds.run(prompts, request, count))
    assert count.num_done == count.num_asked == num_prompts * num_samples

    wanted: list[Call] = []
    completions: list[Completion] = []
    for job in jobs_of(prompts, num_samples):
        seeds = [request_seed(3, step, prompt.id, sample) for prompt, sample in job]
        prompts_of_job = [prompt.token_ids for prompt, _ in job]
        wanted.append((prompts_of_job, seeds, [wanted_settings] * len(job)))
        pairs = zip(job, seeds, strict=True)
        completions += [complete(prompt.token_ids, seed, limit) for (prompt, _), seed in pairs]
    assert fleet.calls == wanted
    assert [len(group) for group in groups] == [num_samples] * num_prompts
    found = [rollout for group in groups for rollout in group]
    for rollout, completion in zip(found, completions, strict=True):
        assert rollout.token_ids == completion.token_ids
        assert rollout.generator_logprobs == completion.logprobs
        assert rollout.finished == completion.finished
        assert rollout.response_mask == (True,) * len(completion.token_ids)
        assert rollout.weight_version == 5


def test_single_turn_by_itself_and_in_a_batch_is_the_same() -> None:
    fleet, prompt = Engines(), prompt_of("p/0", 7, 8)

    async def generate(token_ids: Sequence[int], *, seed: int | None = None) -> Completion:
        assert seed is not None
        return complete(tuple(token_ids), seed, 10)

    made = load_environment("single_turn")(WordTokenizer())
    alone = asyncio.run(made.run(prompt, generate, 100))  # type: ignore[arg-type]
    assert run("single_turn", [prompt], fleet) == [(alone, 5)]


# ---- an environment of one's own ---------------------------------------------------------------

OWN = own_environments.__name__


def test_calls_of_an_own_environment() -> None:
    """One engine call each; seeds of their own; the room beside the prompt; its reward and
    metrics."""
    fleet, prompt = Engines(), prompt_of("p/0", 7, 8)
    ((episode, version),) = run(f"{OWN}:Turns", [prompt], fleet)
    first = complete((7, 8), 100, 10)
    context = (7, 8, *first.token_ids, 50)
    second = complete(context, call_seed(100, 1), 6)
    assert [(*tokens, *seeds) for tokens, seeds, _ in fleet.calls] == [
        ((7, 8), 100),
        (context, call_seed(100, 1)),
        ((9, 9), 101),
    ]
    limits = [replace(SETTINGS, max_response_tokens=most) for most in (10, 6, 2)]
    assert [settings for _, _, (settings,) in fleet.calls] == limits
    assert version == 5 and episode.reward == 0.5 and episode.metrics == {"last": 2}
    assert episode.token_ids == (*first.token_ids, 50, *second.token_ids)
    assert episode.response_mask == (True, True, True, False, True, True, True)
    assert episode.logprobs == (*first.logprobs, 0.0, *second.logprobs)
    assert episode.finished
    assert len({call_seed(100, n) for n in range(20)}) == 20


def test_a_response_fills_its_room_and_no_more() -> None:
    fleet, prompt = Engines(), prompt_of("p/0", 7, 8)
    ((episode, _),) = run(f"{OWN}:Full", [prompt], fleet)
    assert len(episode.token_ids) == 10 and not episode.finished
    assert [c[2][0].max_response_tokens for c in fleet.calls] == [10, 7, 4, 1]
    ((cut, _),) = run(f"{OWN}:Long", [prompt], fleet)
    assert len(cut.token_ids) == len(cut.logprobs) == len(cut.response_mask) == 10
    assert not cut.finished and cut.token_ids[3:] == tuple(range(1, 8))


def test_what_was_generated_by_two_versions_is_made_again() -> None:
    """Every engine was lost between the calls, and their successors have newer weights."""

    class Refitted(Engines):
        async def generate(self, *call: Any) -> tuple[list[Completion], int]:
            answer = await super().generate(*call)
            self.version = 6
            return answer

    fleet = Refitted()
    ((episode, version),) = run(f"{OWN}:Turns", [prompt_of("p/0", 7, 8)], fleet)
    assert version == 6 and len(fleet.calls) == 6
    assert fleet.calls[:3] == fleet.calls[3:]
    assert run(f"{OWN}:Turns", [prompt_of("p/0", 7, 8)], Engines(6)) == [(episode, 6)]


def test_an_episode_without_a_generation_has_the_current_version() -> None:
    ((episode, version),) = run(f"{OWN}:Silent", [prompt_of("p/0", 7)], Engines(4))
    assert version == 4 and episode.response_mask == (False,)


def test_what_it_raises_ends_the_round_with_class_and_prompt() -> None:
    """The others are cancelled."""
    prompts = [prompt_of(f"p/{i}", 7) for i in range(3)]
    wanted = rf"^rollout\.environment: {OWN}:Raises raised LookupError: no such tool on prompt p/1;"
    with pytest.raises(RolloutError, match=wanted):
        run(f"{OWN}:Raises", prompts, Engines())
    assert own_environments.Raises.ended == ["p/0", "p/2"]


def test_engines_lost_for_good_are_not_blamed_on_it() -> None:
    class Lost(Engines):
        async def generate(self, *call: Any) -> tuple[list[Completion], int]:
            raise FleetLost("engine 0 died")

    for name in (f"{OWN}:Asks", "single_turn"):
        with pytest.raises(FleetLost, match=r"^engine 0 died$"):
            run(name, [prompt_of("p/0", 7)], Lost())


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ("none", "found NoneType, expected an Episode"),
        ("lengths", "found 2 token_ids, 1 logprobs and 2 response_mask, expected as many of each"),
        ("nan", "found nan as a trained token's log-prob, expected a finite number"),
        ("nothing", "found None as a trained token's log-prob, expected a finite number"),
        ("reward", "found inf as reward, expected a finite number"),
        ("metric", "found 'text' as metrics, expected a finite number"),
        ("huge", "found 10+ as metrics, expected a finite number"),
        ("name", r"found '\\ud83d' as the name of a metric, expected printable text"),
    ],
)
def test_what_is_no_episode_is_refused(episode: str, message: str) -> None:
    with pytest.raises(RolloutError, match=f"{OWN}:Returns on prompt {episode}: {message}; build"):
        run(f"{OWN}:Returns", [prompt_of(episode, 7)], Engines())


def test_log_probs_that_nothing_reads_may_be_anything() -> None:
    ((episode, _),) = run(f"{OWN}:Returns", [prompt_of("fine", 7)], Engines())
    assert math.isnan(episode.logprobs[0])


def test_a_batch_of_the_wrong_size_is_refused() -> None:
    prompts = [prompt_of(f"p/{i}", 7) for i in range(2)]
    with pytest.raises(RolloutError, match=r"made 0 episodes on prompts p/0 to p/1, expected 2"):
        run(f"{OWN}:FewInBatch", prompts, Engines())


def test_an_environment_that_cancels_itself_is_named() -> None:
    """Frameworks of task groups do so; Ray would take it for a cancelled call."""
    with pytest.raises(RolloutError, match=f"{OWN}:CancelsItself raised CancelledError"):
        run(f"{OWN}:CancelsItself", [prompt_of("p/0", 7)], Engines())


def test_a_constructor_that_raises_is_named() -> None:
    with pytest.raises(RolloutError, match=f"{OWN}:Broken raised OSError: no index while it was"):
        runner_of(f"{OWN}:Broken", Engines())


def test_metrics_are_means_over_the_rollouts_that_have_them() -> None:
    base = Rollout(
        prompt_id="p", sample=0, prompt_token_ids=(1,), token_ids=(), generator_logprobs=(),
        response_mask=(), finished=True, text="", reward=0.0, correct=False, weight_version=0,
    )  # fmt: skip
    rollouts = [replace(base, metrics=m) for m in ({"a": 1.0, "b": 4.0}, {"a": 2.0}, {})]
    assert environment_metrics(rollouts) == {"environment/a": 1.5, "environment/b": 4.0}
    rewarded = [replace(base, metrics=m) for m in ({"turn_rewards": 0.5}, {"a": 1.0}, {})]
    means = {"environment/turn_rewards": 0.5 / 3, "environment/a": 1.0}
    assert environment_metrics(rewarded) == means, "a rollout without any had 0"


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "found_by_check"),
    [
        ("no_such_module:Env", "no_such_module", True),
        ("OWN:Missing", "nothing that can be called 'Missing'", True),
        ("OWN:EPISODES", "nothing that can be called 'EPISODES'", False),
        ("OWN:NoTokenizer", r"cannot be called with \(tokenizer\)", True),
        ("OWN:function", "without an `async def run", False),
        ("OWN:NotAsync", "without an `async def run", False),
        ("OWN:NoSeed", "without an `async def run", False),
        ("OWN:NoRun", "without an `async def run", False),
    ],
)
def test_what_is_no_environment_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str, found_by_check: bool
) -> None:
    monkeypatch.setattr(controller, "start_cluster", lambda: pytest.fail("Ray was started"))
    name = name.replace("OWN", OWN)
    with pytest.raises(PluginError, match=rf"^rollout\.environment: found .*{message}"):
        load_environment(name)
    config = run_config(rollout={"environment": name})
    with pytest.raises(PluginError, match=rf"^rollout\.environment: found .*{message}"):
        controller.start_rollouts(config, model_path="unused")
    found = list(own_code(config))
    assert [problem.key for problem in found] == ["rollout.environment"] * found_by_check


def test_a_name_that_is_neither_built_in_nor_a_module_s_is_refused() -> None:
    with pytest.raises(
        FieldError,
        match=r"found 'multi_turn', expected .* math_tool, agent, verifiers:NAME, or",
    ):
        run_config(rollout={"environment": "multi_turn"})
    assert run_config().rollout.environment == "single_turn"
    ENVIRONMENT.find("single_turn")


# ---- the example -------------------------------------------------------------------------------


def test_the_example() -> None:
    """Two turns become a batch whose loss covers the model's tokens alone."""
    made = runpy.run_path(str(EXAMPLE / "environment.py"))["AnswerThenCheck"](WordTokenizer())
    asked: list[tuple[int, ...]] = []

    async def generate(token_ids: Sequence[int], **_: Any) -> Completion:
        asked.append(tuple(token_ids))
        return complete(tuple(token_ids), 0, 10)

    prompt = prompt_of("p/0", 7, 8)
    episode = asyncio.run(made.run(prompt, generate, 100))
    first, second = (complete(tokens, 0, 10) for tokens in asked)
    check = (5, 4, 7)  # the lengths of its words
    assert asked == [(7, 8), (7, 8, *first.token_ids, *check)]
    assert episode.token_ids == (*first.token_ids, *check, *second.token_ids)
    assert episode.metrics == {"tokens": 6}
    (rollout,) = asyncio.run(Scores().score([(prompt, 0)], [(episode, 0)]))
    (minibatch,) = build_minibatches(
        RolloutBatch.from_rollouts([rollout], 1),
        torch.ones(1),
        BatchLayout(minibatches=1, data_rank=0, data_size=1, max_tokens=99),
    )
    (packed,) = minibatch.microbatches
    trained = packed.labels[packed.loss_mask].tolist()
    assert trained == [*first.token_ids, *second.token_ids]
    assert minibatch.global_valid_tokens == 6
