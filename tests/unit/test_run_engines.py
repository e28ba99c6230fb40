"""Engines that are lost for good, or a stop request without time: the run ends saved, and nothing
of its data is passed over. Rank 0 alone, with stand-ins for what it asks.

Not exercised: real engines (tests/e2e/test_zz_dead_engine.py, test_kills.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.outputs.stopping import OutOfTime, StopRun
from sfpo_megatron.rollout import client as clients
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import CannotBeUsed, ControllerDied, FleetLost, RolloutError
from sfpo_megatron.run.ends import NoFleet
from sfpo_megatron.run.engines import Engines
from sfpo_megatron.run.held_out import Best
from sfpo_megatron.run.opening import other_ends
from sfpo_megatron.tracking.timers import Timers

LOST = FleetLost("engine 0 died once too often")


def raises(error: Exception) -> Callable[..., Any]:
    def work(*arguments: Any, **more: Any) -> Any:
        raise error

    return work


def engines_of(ends: dict[str, Any], *, saves: bool = True, refit: Any = None) -> Engines:
    config = run_config(
        rollout={"async_steps": 1},
        checkpoint={"every": 10 if saves else 0},
        eval={"every": 10},
        data={"eval": [{"source": "jsonl", "path": "x.jsonl"}]},
    )
    control: Any = SimpleNamespace(rank=0, broadcast_json=lambda value=None: value)
    refit = refit or SimpleNamespace(send=lambda version, **more: 0)
    offload: Any = None
    return Engines(config, replace(other_ends(), **ends), control, refit, offload)


@pytest.mark.parametrize("error", [LOST, OutOfTime("SIGUSR1")])
def test_a_run_ends_before_the_next_step_wherever_it_is(error: Exception) -> None:
    feed: Any = SimpleNamespace(collect=raises(error), hold=raises(error))
    engines = engines_of({"feed": feed, "evaluation": raises(error)})
    for step, act in (
        (7, lambda: engines.collect(7)),
        (8, lambda: engines.hold(7)),
        (8, lambda: engines.evaluate(step=7)),
    ):
        with pytest.raises(StopRun) as stop:
            act()
        assert (stop.value.step, stop.value.begun) == (step, False)
        assert str(stop.value) == str(error)


def test_a_run_that_saves_nothing_fails() -> None:
    engines = engines_of({"evaluation": raises(LOST)}, saves=False)
    with pytest.raises(FleetLost):
        engines.evaluate(step=7)


def test_the_last_evaluation_costs_no_training() -> None:
    """The run saves nothing and all its steps are made: the policy can still be exported."""
    said: list[str] = []
    tracker: Any = SimpleNamespace(important=said.append)
    engines = engines_of({"evaluation": raises(LOST), "tracker": tracker}, saves=False)
    with pytest.raises(FleetLost):
        engines.evaluate_if_due(10)
    last = run_config().train.steps
    assert engines.evaluate_if_due(last) is True
    assert said == [f"warning: {LOST}; the evaluation after step {last}, the last, is missing"]


class PolledFleet(NoFleet):
    """Its waits look for requests where they are told to."""

    def __init__(self) -> None:
        self.poll: Callable[[], None] = lambda: None

    @contextmanager
    def polling(self, poll: Callable[[], None]) -> Iterator[None]:
        before, self.poll = self.poll, poll
        try:
            yield
        finally:
            self.poll = before


@pytest.mark.parametrize("where", ["wait", "refit"])
def test_a_step_is_ended_before_its_engines_are_missed(where: str) -> None:
    """It has yet to be counted and logged, or the checkpoint would lack it."""
    fine: Callable[..., None] = lambda *arguments, **more: None  # noqa: E731
    feed: Any = SimpleNamespace(wait_generated=raises(LOST) if where == "wait" else fine)
    refit = SimpleNamespace(send=raises(LOST) if where == "refit" else fine)
    engines = engines_of({"feed": feed}, refit=refit)
    engines.take_weights(7, Timers())
    for act in (lambda: engines.collect(8), lambda: engines.hold(7)):
        with pytest.raises(StopRun, match="once too often") as stop:
            act()
        assert (stop.value.step, stop.value.begun) == (8, False)


def test_a_step_is_ended_where_a_stop_cuts_off_the_wait_for_the_next() -> None:
    """Its weights are sent only once async_steps' rollouts are there, which may take too long."""
    fleet, sent = PolledFleet(), list[int]()
    feed: Any = SimpleNamespace(wait_generated=lambda: fleet.poll(), hold=lambda refit: None)
    stop: Any = SimpleNamespace(reason="SIGUSR1", check=raises(OutOfTime("SIGUSR1")))
    refit = SimpleNamespace(send=sent.append)
    engines = engines_of({"fleet": fleet, "feed": feed, "stop": stop}, refit=refit)
    engines.take_weights(7, Timers())
    assert sent == []
    with pytest.raises(StopRun, match="SIGUSR1") as ended:
        engines.hold(7)
    assert (ended.value.step, ended.value.begun) == (8, False)


def test_a_stop_without_time_cuts_off_what_is_taken_in_for_a_save() -> None:
    """Its rewards may take longer than there is time; a resumed run makes those rollouts again."""
    fleet = PolledFleet()
    feed: Any = SimpleNamespace(hold=lambda refit: fleet.poll())
    stop: Any = SimpleNamespace(reason="SIGUSR1", check=raises(OutOfTime("SIGUSR1")))
    engines = engines_of({"fleet": fleet, "feed": feed, "stop": stop})
    with pytest.raises(StopRun, match="SIGUSR1") as ended:
        engines.hold(7)
    assert (ended.value.step, ended.value.begun) == (8, False)


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for() -> None:
    """Every tenth step has one; that of step 10 is in the checkpoint, that of step 20 is not."""
    best = Best()
    best.observe(10, 0.5)
    engines = engines_of({"best": best})
    assert not engines.lacks_evaluation(7) and not engines.lacks_evaluation(10)
    assert engines.lacks_evaluation(20)


# ---- rank 0's end ------------------------------------------------------------------------------


class Calls:
    """Answers what a list says; an error in it is raised."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.spawned, self.doing = answers, 0, list[str]()
        self.controller: Any = SimpleNamespace(
            submit=SimpleNamespace(remote=lambda request: None),
            collect=SimpleNamespace(remote=lambda request_id: None),
            needs_introduction=SimpleNamespace(remote=lambda only_stale: None),
        )
        self.starting = None

    def spawn(self) -> None:
        self.spawned += 1

    def kill(self) -> None:
        pass

    def wait(self, call: object, doing: str, **more: Any) -> Any:
        self.doing.append(f"{doing} {more.get('timeout_s', '')}".strip())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[Any]], Any]]:
    def make(answers: list[Any]) -> Any:
        config = run_config(rollout={"max_restarts": 2, "timeout_s": 1234.0})
        made: Any = RolloutClient(config, lambda **versions: None, owns_cluster=False)
        made.calls.answers = answers
        monkeypatch.setattr(made, "learn_processes", lambda: None)
        return made

    monkeypatch.setattr(clients, "ControllerCalls", lambda spawn, directory: Calls([]))
    monkeypatch.setattr(clients, "wait_until_gone", lambda members: None)
    monkeypatch.setattr(clients, "atexit", SimpleNamespace(register=lambda f: None))
    yield make


REQUEST = SimpleNamespace(id="train/3")


def test_a_controller_that_dies_before_a_request_is_restarted(client: Any) -> None:
    """Its restart takes as long as the first start may, and may fail once more."""
    died = ControllerDied("gone")
    made = client([died, died, None, None])
    made.submit(REQUEST)
    assert made.calls.doing == [
        "submitting request train/3",
        "starting the engines 1234.0",
        "starting the engines 1234.0",
        "submitting request train/3 again",
    ]
    assert made.num_controller_restarts == 2 and not made.calls.answers


NO_START = RolloutError("engine 0 died while starting: no memory")


def test_a_start_that_fails_is_made_again_as_often_as_a_death(client: Any) -> None:
    """A device that the last engine had may be free a moment later; the request goes on."""
    made = client([ControllerDied("gone"), NO_START, None, None])
    made.submit(REQUEST)
    assert made.num_controller_restarts == 2 and not made.calls.answers


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([NO_START, NO_START], r"no memory; that is one more than rollout\.max_restarts=2 allows"),
        ([CannotBeUsed("environment: gone")], "gone; the next did not start: environment: gone"),
        ([None, ControllerDied("again"), NO_START], "no memory; that is one more than"),
    ],
)
def test_a_controller_that_does_not_start_again_leaves_what_can_be_saved(
    client: Any, errors: list[Any], said: str
) -> None:
    """Not a failure of rank 0 alone, which the other ranks would not survive: from a request, and
    from an update, amid collectives."""
    made = client([ControllerDied("gone"), *errors])
    with pytest.raises(FleetLost, match=said):
        made.submit(REQUEST)
    in_update = client([ControllerDied("gone"), *errors[errors[0] is None :], NO_START])
    assert in_update.sync_client.needs_introduction()
    for act in (lambda: in_update.submit(REQUEST), lambda: in_update.collect("train/3")):
        with pytest.raises(FleetLost):
            act()


def test_starts_that_hang_end_before_the_other_ranks_have_waited_too_long(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, now = client([ControllerDied("gone"), NO_START]), [0.0]
    wait = made.calls.wait

    def slowly(call: object, doing: str, **more: Any) -> Any:
        now[0] += more.get("timeout_s", 0.0) + 1.0
        return wait(call, doing, **more)

    monkeypatch.setattr(made.calls, "wait", slowly)
    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(FleetLost, match=r"no memory; .*within rollout\.timeout_s=1234 s"):
        made.submit(REQUEST)


def test_who_asks_next_hears_that_the_engines_are_lost(client: Any) -> None:
    """In an update the other ranks wait in collectives: rank 0 may not leave them there."""
    made = client([ControllerDied("gone")] * 3)
    assert made.sync_client.needs_introduction()
    assert not made.calls.answers
    for act in (lambda: made.submit(REQUEST), lambda: made.collect("train/3")):
        with pytest.raises(FleetLost, match=r"one more than rollout\.max_restarts=2 allows"):
            act()
