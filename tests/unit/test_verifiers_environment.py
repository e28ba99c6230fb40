"""Environments of the verifiers package as ours: names, settings, tasks as prompts, an episode.

The package is not in the environment of the tests: a small stand-in of what is used of its
`verifiers.v1` takes its place where it is missing. Its program asks the endpoint as the package's
client does: with the key of the variable, and the trace's id as X-Session-ID. The package itself,
with its own harness, is what `examples/verifiers` runs.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import pytest
from made.configs import run_config
from made.endpoint import END, Says, user
from made.tool_templates import tool_tokenizer

from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.rules.agent import agent as agent_rule
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.references import References
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.verifiers_tasks import ANSWER, INDEX, rows
from sfpo_megatron.plugins import ENVIRONMENT
from sfpo_megatron.rollout.environments.verifiers_play import VerifiersEnvironment
from sfpo_megatron.rollout.episodes import Episode, load_environment
from sfpo_megatron.types import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples/verifiers/config.yaml"


@dataclass
class Settings:
    """The package's configs: whatever they are given."""

    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def model_validate(cls, values: dict[str, Any]) -> Settings:
        return cls(values)


class Tasks:
    def __init__(self, settings: Settings) -> None:
        self.num_tasks = settings.values.get("num_tasks", 3)

    def __iter__(self) -> Any:
        for index in range(self.num_tasks):
            yield SimpleNamespace(data=SimpleNamespace(prompt_text=f"Task {index}?", name=None))


class Env:
    """One program asks once, and is rewarded for the number of the task."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.values
        self.taskset = Tasks(Settings(settings.values["taskset"]))
        self.is_serving = False

    @asynccontextmanager
    async def serving(self) -> Any:
        self.is_serving = True
        yield
        self.is_serving = False

    async def run_episode(self, task: Any, context: Any, *, on_trace: Any) -> Any:
        import os

        assert self.is_serving
        trace = SimpleNamespace(id=f"trace-{id(task)}", errors=[], metrics={"none": None})
        on_trace(trace)
        headers = {
            "Authorization": f"Bearer {os.environ[context.client.api_key_var]}",
            "X-Session-ID": trace.id,
        }
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                f"{context.client.base_url}/chat/completions",
                json={"model": context.model, "messages": [user(task.data.prompt_text)]},
                headers=headers,
            ) as answer,
        ):
            said = (await answer.json())["choices"][0]["message"]["content"]
        if said == "fail":
            trace.errors.append(SimpleNamespace(type="TaskError", message="no such file"))
        trace.reward, trace.metrics["letters"] = 0.5, float(len(said))
        return SimpleNamespace(errors=[], traces=[trace])


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, loaders = ModuleType("verifiers.v1.clients"), ModuleType("verifiers.v1.utils.loaders")
    vars(clients).update(EvalClientConfig=SimpleNamespace, ModelContext=SimpleNamespace)
    vars(loaders).update(
        load_environment=Env,
        resolve_env_config=Settings,
        load_taskset=Tasks,
        taskset_config_type=lambda name: Settings,
    )
    for module in (clients, loaders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("verifiers", "verifiers.v1", "verifiers.v1.utils"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def prompt_of(index: int | None) -> Prompt:
    metadata = {} if index is None else {INDEX: index}
    return Prompt(id="p/0", text="", token_ids=(5,), question="", answer="", metadata=metadata)


def play(prompt: Prompt, turn: str = "seven") -> tuple[Any, Episode]:
    tokenizer = tool_tokenizer()
    env = {"agent": {"harness": {"id": "null"}}, "taskset": {"num_tasks": 2}}
    environment = VerifiersEnvironment(tokenizer, name="numbers", env=env)
    try:
        assert environment._env.settings == {**env, "taskset": {"num_tasks": 2, "id": "numbers"}}
        made = asyncio.run(environment.run(prompt, Says(tokenizer, f"{turn}{END}"), 3))
    finally:
        environment.close()
    assert not environment._env.is_serving
    return tokenizer, made


def test_an_episode_is_the_packages() -> None:
    """The task is the prompt's; tokens are the endpoint's; reward and metrics the trace's."""
    tokenizer, episode = play(prompt_of(1))
    assert "Task 1?" in tokenizer.decode(episode.prompt_token_ids)
    assert tokenizer.decode(episode.token_ids) == f"seven{END}" and all(episode.response_mask)
    assert episode.reward == 0.5 and episode.metrics["letters"] == 5.0
    assert "none" not in episode.metrics


def test_what_fails_in_the_package_costs_the_episode(caplog: pytest.LogCaptureFixture) -> None:
    _, episode = play(prompt_of(0), "fail")
    assert episode.metrics["stop_error"] == 1 and episode.reward is None
    assert "an agent raised RuntimeError: TaskError: no such file" in caplog.text


def test_a_prompt_of_another_source_is_refused() -> None:
    with pytest.raises(ValueError, match="found a prompt that is no task of verifiers:numbers"):
        play(prompt_of(None))


def test_tasks_are_rows() -> None:
    source = DataSource(
        source="sfpo_megatron.data.verifiers_tasks:rows", args={"name": "numbers", "num_tasks": 2}
    )
    assert list(rows(source, 0)) == [
        {"prompt": f"Task {index}?", "answer": ANSWER, INDEX: index} for index in range(2)
    ]


def test_a_run_takes_these_rows() -> None:
    """The reward that the example names takes them; no answer of a model satisfies it."""
    source = DataSource(
        source="sfpo_megatron.data.verifiers_tasks:rows", args={"name": "numbers", "num_tasks": 2}
    )
    reward = load_config(EXAMPLE).reward
    for given in rows(source, 0):
        row = row_of(given, where="here", row_id="numbers/0")
        assert isinstance(row, Row) and References(reward).fault(row) is None
        assert row.metadata[INDEX] in (0, 1)


@pytest.mark.parametrize("name", ["verifiers:gsm8k", "verifiers:owner/word-game@1.2"])
def test_names(name: str) -> None:
    assert ENVIRONMENT.knows(name) and load_environment(name) is VerifiersEnvironment
    ENVIRONMENT.find(name)
    config = run_config(rollout={"environment": name}, data={"chat_template": True})
    assert not list(agent_rule(config))


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ENVIRONMENT.knows("verifiers:") and "verifiers:NAME" in ENVIRONMENT.expected
    for rollout, wanted in (
        ({"reproducible": True}, "rollout.reproducible: found true with rollout.environment verif"),
        ({"environment_args": {"harness": 1}}, "environment_args.harness: found an unknown key"),
    ):
        assert wanted in problem_of(**rollout)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    assert "found verifiers:numbers, and no package verifiers in this Python" in problem_of()


def problem_of(**rollout: Any) -> str:
    config = run_config(
        rollout={"environment": "verifiers:numbers", **rollout}, data={"chat_template": True}
    )
    (problem,) = agent_rule(config)
    return f"{problem.key}: {problem.message}"
