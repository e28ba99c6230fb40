"""Engines die while they generate, while they take weights and in between; nothing is lost.

A fleet of two engines, and a whole run in which engines are killed at random moments. Not
exercised: engines on GPUs, several hosts.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import fleet
import pytest
import tiny
import torch.distributed as dist
from engines import assert_is_model
from made.waiting import wait_for
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.client import RolloutClient

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def two(start: Any, models: dict[str, Path]) -> RolloutClient:
    """Two engines of one worker each."""
    client = start(models["untied_a"], num_engines=2, max_restarts=50, timeout_s=40.0)
    client.wait_ready(280)
    return client


class InterruptedSource(fleet.StateSource):
    """Calls `interrupt` once, half-way through its next iteration."""

    interrupt: Any = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        items = self._items()
        for number, item in enumerate(items):
            if number == len(items) // 2 and self.interrupt is not None:
                interrupt, self.interrupt = self.interrupt, None
                interrupt()
            yield item


def sender_of(client: RolloutClient, model: Path, tmp_path: Path) -> tuple[Refit, Any]:
    source = InterruptedSource(tiny.load_state(model))
    config = fleet.make_config(model, tmp_path)
    return Refit(config, source=source, client=client.sync_client), source


def test_two_engines_of_two_workers(start: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """Rollouts are those of the last refit's model, whichever engine made them."""
    client = start(models["untied_a"], num_engines=2, tensor_parallel=2)
    client.wait_ready(280)
    sender, _ = sender_of(client, models["untied_b"], tmp_path)
    sender.send(1)
    client.submit(fleet.make_request("shared", num_samples=16))
    made = client.collect("shared")
    assert len(made) == 128
    assert_is_model(made[::16], models["untied_b"])
    assert client.health().engines_alive == (True, True)
    sender.close()
    client.close()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_two_goes_while_generating(
    two: RolloutClient, signum: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """SIGSTOP: it hangs, and is ended after rollout.timeout_s (40 s)."""
    sender, _ = sender_of(two, models["untied_a"], tmp_path)
    sender.send(2)
    before = two.health().num_restarts
    two.submit(fleet.make_request("half", num_samples=16, max_response_tokens=200))
    time.sleep(0.2)
    os.kill(fleet.process_of(two, "EngineCore", 1), signum)
    made = two.collect("half", lambda: sender.send(2, only_stale=True) and None)
    assert len(made) == 128 and two.health().num_restarts == before + 1
    assert_is_model(made[::16], models["untied_a"])
    sender.close()
    wait_for(lambda: all(two.health().engines_alive), timeout_s=90, what="the second engine")


@pytest.mark.parametrize("engines", [(0,), (0, 1)])
def test_killed_in_mid_update(
    two: RolloutClient, engines: tuple[int, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    """The others have the new weights, the new one gets them; even where nobody is left."""
    sender, source = sender_of(two, models["untied_b"], tmp_path)
    pids = [fleet.process_of(two, "EngineCore", engine) for engine in engines]
    source.interrupt = lambda: [os.kill(pid, signal.SIGKILL) for pid in pids]
    sender.send(3)
    two.submit(fleet.make_request("after"))
    made = two.collect("after", lambda: sender.send(3, only_stale=True) and None)
    assert {rollout.weight_version for rollout in made} == {3}
    assert_is_model(made, models["untied_b"])
    sender.close()
    wait_for(lambda: all(two.health().engines_alive), timeout_s=90, what="both engines")


class GatheredSource(InterruptedSource):
    """Gives tensors as `MegatronWeightSource` gives a leader; the only rank is the leader."""

    @property
    def sharded(self) -> GatheredSource:
        return self

    def metadata(self) -> list[Any]:
        return [
            TensorMeta(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in self.state.items()
        ]

    @property
    def leaders(self) -> list[int]:
        return [0] * len(self.state)

    before_all = False
    """Interrupted before the first broadcast, in whose round communicators are made."""

    def prepare(self) -> None:
        if self.before_all:
            self.interrupt_once()

    def gather(self, index: int) -> Tensor:
        if index == len(self.state) // 2:
            self.interrupt_once()
        return list(self.state.values())[index]

    def interrupt_once(self) -> None:
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            interrupt()


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.distributed with this process alone, on loopback."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if dist.is_initialized():  # by another test's engine inside this process
        yield
        return
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gloo(start: Any, models: dict[str, Path]) -> RolloutClient:
    """Two engines of two workers each, in one communicator with the trainer."""
    client = start(
        models["untied_a"], num_engines=2, tensor_parallel=2, max_restarts=50, transport="gloo"
    )
    client.wait_ready(280)
    return client


@pytest.mark.parametrize("before_all", [False, True], ids=["mid", "introduced"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_of_a_broadcast_survive(
    gloo: RolloutClient,
    one_rank: None,
    signum: int,
    before_all: bool,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    """A worker dies, or hangs, in mid-update, or when it has been introduced and not yet joined:
    its engine alone is restarted, the other one (the same processes) gets everything again and is
    the sent model."""
    before, source = gloo.health().num_restarts, GatheredSource(tiny.load_state(models["untied_b"]))
    source.before_all = before_all
    config = fleet.make_config(
        models["untied_b"], tmp_path, transport="gloo", num_engines=2, tensor_parallel=2
    )
    sender = Refit(config, source=source, client=gloo.sync_client)
    version = gloo.health().weight_version + 1
    wait_for(lambda: all(gloo.health().engines_alive), timeout_s=150, what="both engines")
    survivor = fleet.process_of(gloo, "EngineCore", 0)
    victim = fleet.process_of(gloo, "worker", 1)
    source.interrupt = lambda: os.kill(victim, signum)
    assert sender.send(version) == 0
    gloo.submit(fleet.make_request("after"))
    made = gloo.collect("after", lambda: sender.send(version, only_stale=True) and None)
    assert {rollout.weight_version for rollout in made} == {version}
    assert_is_model(made, models["untied_b"])
    wait_for(lambda: all(gloo.health().engines_alive), timeout_s=150, what="both engines")
    assert fleet.process_of(gloo, "EngineCore", 0) == survivor
    assert gloo.health().num_restarts == before + 1
    # And the whole fleet once more, over a communicator of both.
    source.state = tiny.load_state(models["untied_a"])
    sender.send(version + 1)
    gloo.submit(fleet.make_request("whole", num_samples=16))
    made = gloo.collect("whole")
    assert_is_model(made[::16], models["untied_a"])
    sender.close()


@pytest.mark.parametrize(("num_kills", "tensor"), [(3, 2), (20, 1)], ids=["3", "20"])
def test_a_run_with_kills_at_random_moments(tmp_path: Path, num_kills: int, tensor: int) -> None:
    """Every step is there with its full count, and the engines end up with the trainer's weights:
    their log-probs are its own."""
    model = digits.make_model(tmp_path / "model")
    config = digits.write_config(
        tmp_path,
        model,
        parallel={"tensor": tensor},
        train={"num_steps": 10_000},
        rollout={"num_engines": 2, "max_restarts": 10 * num_kills},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = digits.start_train(config)
    dice = random.Random(0)

    def num_steps() -> int:
        assert process.poll() is None, process.communicate()[0]
        return metrics.read_text().count('"loss"') if metrics.exists() else 0

    try:
        wait_for(lambda: num_steps() >= 2, timeout_s=180, what="two train steps")
        for _ in range(num_kills):
            time.sleep(dice.uniform(0.0, 3.0))
            engine = wait_for(
                lambda: digits.engine_processes(process), timeout_s=120, what="an engine to kill"
            )
            dice.choice(engine).kill()
        done = num_steps()
        wait_for(lambda: num_steps() >= done + 3, timeout_s=180, what="three more steps")
    finally:
        if process.poll() is None:
            digits.end(process)
    steps, _ = digits.read_metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    for line in steps:
        assert line["num_rollouts"] == 128 * line["step"]
        assert line["staleness"] == 0
        assert line["logprob_diff_mean"] < 1e-4, line
    # A process may be killed before its engine was up: then it is counted too.
    assert steps[-1]["num_engine_restarts"] >= num_kills - 1
