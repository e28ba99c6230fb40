"""Shared by the e2e tests: configs, requests, a weight source, and an engine with a faulty twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from torch import Tensor

from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    RefitConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from sfpo_megatron.host.processes import ProcessIdentity
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.controller import RolloutController
from sfpo_megatron.rollout.engine import Engine
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.types import Prompt

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 100, 256
# Longer than two blocks of 32, of different lengths: prefix caching has whole blocks to get wrong.
PROMPTS = tuple(
    Prompt(
        id=f"made/{i}",
        text="",
        token_ids=tuple((13 * i + j * j) % 300 + 5 for j in range(66 + 5 * i % 17)),
        question="",
        answer="7",
    )
    for i in range(8)
)


def make_config(
    model: Path,
    output_dir: Path,
    *,
    dtype: Any = "float32",
    transport: Any = "auto",
    chat_template: bool = False,
    **rollout: Any,
) -> RunConfig:
    settings: dict[str, Any] = {
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
        "engine_args": {"block_size": 32},
        "timeout_s": 120.0,
    }
    return RunConfig(
        output_dir=str(output_dir),
        model=ModelConfig(path=str(model), dtype=dtype),
        data=DataConfig(
            train=(DataSource(source="jsonl", path="unused.jsonl"),), chat_template=chat_template
        ),
        rollout=RolloutConfig(**(settings | rollout)),
        # Smaller than most layers: every layer is spread over buckets.
        refit=RefitConfig(bucket_bytes=100_000, timeout_s=30.0, transport=transport),
        reward=RewardConfig(function="exact_match"),
    )


def make_request(request_id: str, **changes: Any) -> RolloutRequest:
    settings: dict[str, Any] = {
        "id": request_id,
        "step": 1,
        "prompts": PROMPTS,
        "num_samples": 2,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_response_tokens": 16,
    }
    return RolloutRequest(**(settings | changes))


def processes_of(client: RolloutClient) -> list[ProcessIdentity]:
    """Every process of a fleet, the guards too."""
    return [
        process
        for actor in client.processes.actors
        for process in (*actor.members, actor.guard)
        if process is not None
    ]


def process_of(client: RolloutClient, what: str, engine: int = 0) -> int:
    """The controller, an engine's actor (Ray titles both), its EngineCore, or one of its workers.
    Processes as they are now: engines may have been restarted."""
    client.learn_processes()
    if what == "controller":
        return client.processes.actors[0].members[0].pid
    actor = psutil.Process(client.processes.actors[1 + engine].members[0].pid)
    found = actor
    for _ in range({"actor": 0, "EngineCore": 1, "worker": 2}[what]):
        children = [child for child in found.children() if "spawn_main" in "".join(child.cmdline())]
        found = children[0]
    return found.pid


class OneRank:
    """`seams.Control` of a trainer of one rank."""

    rank, size = 0, 1

    def broadcast_json(self, value: Any) -> Any:
        return value

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        pass


class StateSource:
    """A weight source over full tensors that are already here."""

    control = OneRank()
    sharded: Any = None

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def metadata(self) -> list[Any]:
        return [SimpleNamespace(name=n, shape=t.shape, dtype=t.dtype) for n, t in self._items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._items())

    def _items(self) -> list[tuple[str, Tensor]]:
        return list(self.state.items())


class SwitchableEngine(Engine):
    """The engine, and on demand the engine without its prefix-cache guard."""

    forgets = True

    async def forget_prefixes(self) -> None:
        if self.forgets:
            await super().forget_prefixes()

    async def set_forgets(self, forgets: bool) -> None:
        self.forgets = forgets


class SwitchableController(RolloutController):
    """Reaches the switch of its engines."""

    engine_class = SwitchableEngine

    async def set_forgets(self, forgets: bool) -> None:
        for engine in self._fleet.engines:
            await engine.actor.set_forgets.remote(forgets)
