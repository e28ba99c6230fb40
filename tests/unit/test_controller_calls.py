"""Waits for the controller, beside a Ray that is a stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config
from ray.exceptions import RayError

from sfpo_megatron.host.progress import forget_observer, observe_progress
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout import calls
from sfpo_megatron.rollout import client as clients
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.reports import FleetProgress, RolloutCount
from sfpo_megatron.rollout.sync_client import WeightSyncClient


class Call:
    """Is answered at the `num_looks`-th look."""

    def __init__(self, answer: Any, num_looks: int = 1) -> None:
        self.answer, self.left = answer, num_looks

    def is_done(self) -> bool:
        self.left -= 1
        return self.left <= 0


class Controller:
    """Answers a question about its progress from a list; the last one again and again."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.start = SimpleNamespace(remote=lambda: Call(None))
        self.progress = SimpleNamespace(remote=self._progress)

    def _progress(self, request_id: str) -> Call:
        self.asked.append(request_id)
        return Call(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


class Seen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def advanced(self, unit: str, done: int, total: int) -> None:
        self.told.append((unit, done, total))

    def noted(self, text: str) -> None:
        self.told.append(text)


def get(call: Call) -> Any:
    if isinstance(call.answer, Exception):
        raise call.answer
    return call.answer


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray answers by looks, and time passes as Ray is told to wait."""
    now = [0.0]

    def wait(refs: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        now[0] += timeout
        return [ref for ref in refs if ref.is_done()], []

    monkeypatch.setattr(calls, "ray", SimpleNamespace(wait=wait, get=get))
    monkeypatch.setattr(calls, "time", SimpleNamespace(monotonic=lambda: now[0]))


def calls_to(controller: Controller) -> Any:
    """`ControllerCalls`, which would want a real one."""

    def spawn(*, weight_version: int, has_sent: bool) -> Any:
        return controller

    return calls.ControllerCalls(spawn, RunDirectory(Path("run")))


def progress(done: int, asked: int, *starting: str) -> FleetProgress:
    count = RolloutCount(num_done=done, num_asked=asked)
    return FleetProgress(count=count, starting=starting)


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("timeout_s", [None, 600.0])
def test_who_watches_hears_how_far_the_controller_is(timeout_s: float | None) -> None:
    """An error for an answer is no news: the call that is waited for says what it is."""
    answers = [progress(0, 0, "engine 0 is loading weights"), RayError(), progress(16, 64)]
    controller, seen = Controller(answers), Seen()
    made = calls_to(controller)
    observe_progress(seen)
    try:
        waited = made.wait(Call("rollouts", 20), "x", timeout_s=timeout_s, request_id="train/3")
    finally:
        forget_observer(seen)
    assert waited == "rollouts"
    assert seen.told[:3] == ["engine 0 is loading weights", "", ("rollouts", 16, 64)]
    assert set(controller.asked) == {"train/3"} and len(controller.asked) >= 3


@pytest.mark.usefixtures("waiting")
def test_nobody_is_asked_where_nobody_watches() -> None:
    controller = Controller([progress(0, 0)])
    made = calls_to(controller)
    assert made.wait(Call("rollouts", 20), "x", timeout_s=None) == "rollouts"
    assert controller.asked == []


@pytest.mark.usefixtures("waiting")
def test_engines_that_load_for_too_long_name_the_key_that_gives_them_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "atexit", SimpleNamespace(register=lambda f: None))
    controller: Any = Controller([progress(0, 0)])
    controller.start = SimpleNamespace(remote=lambda: Call(None, 10_000))
    client = clients.RolloutClient(run_config(), lambda **versions: controller, owns_cluster=False)
    said = r"^no answer after 60 s starting the engines \(rollout\.timeout_s: raise it .*; logs: "
    with pytest.raises(RolloutError, match=said):
        client.wait_ready(60.0)


@pytest.mark.usefixtures("waiting")
def test_another_controller_hears_which_weights_were_sent() -> None:
    """A run that begins with other weights than model.path's sends them as version 0."""
    spawned: list[dict[str, Any]] = []
    controller: Any = Controller([])
    controller.finish_weight_update = SimpleNamespace(remote=lambda: Call(None))

    def spawn(**versions: Any) -> Any:
        spawned.append(versions)
        return controller

    made = calls.ControllerCalls(spawn, RunDirectory(Path("run")))
    client = WeightSyncClient(made, "shm", lambda reason: None)
    for version in (0, 1):
        client.prepare(version, only_stale=False)
        client.finish_weight_update()
        made.spawn()
    assert spawned == [
        {"weight_version": 0, "has_sent": False},
        {"weight_version": 0, "has_sent": True},
        {"weight_version": 1, "has_sent": True},
    ]


def test_a_poll_goes_on_after_a_wait_without_one(waiting: None) -> None:
    made, polled = calls_to(Controller([])), list[str]()

    def wait() -> None:
        made.wait(Call(None, num_looks=2), "waiting")

    with made.polling(lambda: polled.append("outer")):
        with made.polling(lambda: None):
            wait()
        wait()
    wait()
    assert polled == ["outer"]
