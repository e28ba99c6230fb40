"""A module of a user's own in the working directory, and a scoring pool on its function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.pool import Score, ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

Own = Callable[..., ScoringPool]


def problem(answer: str = "42", name: str = "p/0", **metadata: Any) -> WireProblem:
    return WireProblem(id=name, question="6 * 7 =", answer=answer, metadata=metadata)


def rewards(scores: Sequence[Score]) -> list[float]:
    return [score.reward for score in scores]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`own(source, "score", **config)`: a pool on that function of `mine.py` with this source; its
    logs are in run/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    pools: list[ScoringPool] = []

    def make(source: str, name: str = "score", **config: Any) -> ScoringPool:
        Path("mine.py").write_text(source, encoding="utf-8")
        reward = RewardConfig(**{"function": f"mine:{name}", "timeout_s": 20.0, **config})
        pools.append(ScoringPool(reward, RunDirectory.of("run")))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def log_of(number: int = 0) -> str:
    return RunDirectory.of("run").scoring_log(number).read_text(encoding="utf-8")


MEET = """
import pathlib, time
def meet(name, *names):
    # Wait for the other processes: each of them has one response then.
    pathlib.Path("here-" + name).touch()
    while not all(pathlib.Path("here-" + other).exists() for other in names):
        time.sleep(0.01)
"""
