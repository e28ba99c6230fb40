"""Colocated engines: who sleeps, wakes and is replaced when, with stand-ins for Ray's actors.

Not exercised: vLLM's sleep mode (tests/e2e/test_colocated.py holds its names), real processes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from made import fleets
from made.fleets import Actor, job, until, update

from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.rollout.updates import UpdatableFleet as Fleet


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, Any]]:
    """(engine, method, first argument) of everything that is asked of an engine, but for pings."""
    seen: list[tuple[int, str, Any]] = []
    answer = Actor.answer

    async def recorded(self: Actor, name: str, *args: Any) -> Any:
        if name not in ("alive", "processes"):
            seen.append((self.index, name, args[0] if args else None))
        return await answer(self, name, *args)

    monkeypatch.setattr(Actor, "answer", recorded)
    return seen


def make_fleet(actors: list[Actor], kind: type[Actor] = Actor, **rollout: Any) -> Fleet:
    return fleets.make_fleet(actors, kind, placement="colocated", **rollout)


async def handed_to_engines(fleet: Fleet, version: int, *, only_stale: bool = False) -> None:
    await fleet.wake("weights")
    await update(fleet, version, only_stale=only_stale)
    assert not fleet.can_generate, "it would be given work without keys and values"
    await fleet.wake("kv_cache")


def test_a_turn(actors: list[Actor], calls: list[Any]) -> None:
    """Asleep no engine gets work; awake it has the weights of the update, first its own memory,
    then keys and values."""

    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        assert fleet.can_generate
        await fleet.sleep()
        assert not fleet.can_generate and not fleet.wants_weights
        work = job(fleet, 5)
        await asyncio.sleep(0.05)
        assert not work.done()
        await handed_to_engines(fleet, 0)
        assert await work == (["made by 0"], 0)
        ours = [(name, first) for index, name, first in calls if index == 0]
        assert [name for name, _ in ours] == [
            *("start", "sleep", "wake", "init_weight_transfer_engine", "start_weight_update"),
            *("update_weights", "finish_weight_update", "wake", "generate"),
        ]
        assert [first for name, first in ours if name == "wake"] == ["weights", "kv_cache"]
        await fleet.shutdown()

    asyncio.run(run())


def test_one_that_dies_in_the_trainers_turn_is_replaced_after_it(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        await fleet.sleep()
        actors[0].dead.set()
        await until(lambda: fleet.engines[0].gone)
        await fleet.wake("weights")
        await update(fleet, 1)
        await asyncio.sleep(0.1)
        assert len(actors) == 2, "started where the trainer's memory is"
        await fleet.wake("kv_cache")
        await until(lambda: len(actors) == 3 and all(e.ready for e in fleet.engines))
        # The other one can go on: the trainer need not come back for the new one.
        assert fleet.can_generate and not fleet.wants_weights
        assert await job(fleet, 5) == (["made by 1"], 1)
        await fleet.sleep()
        await handed_to_engines(fleet, 2)
        assert [engine.version for engine in fleet.engines] == [2, 2]
        await fleet.shutdown()

    asyncio.run(run())


def test_when_none_can_generate_the_trainer_comes_back(actors: list[Actor]) -> None:
    """Both die in their turn; the request ends by engines that got the weights again, all of
    them: those that slept have none."""

    async def run() -> None:
        fleet = make_fleet(actors, max_restarts=2)
        await fleet.start()
        await fleet.sleep()
        await handed_to_engines(fleet, 1)
        for actor in actors:
            actor.release.clear()
        work = job(fleet, 5)
        await until(lambda: actors[0].seeds)
        for actor in list(actors):
            actor.dead.set()
        await until(lambda: fleet.wants_weights)
        await fleet.sleep()  # waits for the second one to come up
        assert all(engine.asleep for engine in fleet.engines)
        await handed_to_engines(fleet, 1, only_stale=True)
        assert await work == (["made by 0"], 1)
        assert [engine.version for engine in fleet.engines] == [1, 1]
        await fleet.shutdown()

    asyncio.run(run())


def test_one_that_does_not_fall_asleep_is_ended(actors: list[Actor]) -> None:
    """Its memory is free when `sleep` returns, and the others sleep."""

    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        actors[1].hangs.add("sleep")
        await fleet.sleep()
        assert actors[1].dead.is_set() and fleet.engines[1].gone and fleet.engines[0].asleep
        await handed_to_engines(fleet, 1)
        await until(lambda: len(actors) == 3 and fleet.engines[1].ready)
        await fleet.shutdown()

    asyncio.run(run())


def test_one_loss_too_many_is_said_when_something_is_generated(actors: list[Actor]) -> None:
    """Not while the trainer waits for its devices: it has a step to make and to save."""

    async def run() -> None:
        fleet = make_fleet(actors, max_restarts=0)
        await fleet.start()
        await fleet.sleep()
        actors[0].dead.set()
        await until(lambda: fleet.engines[0].lost)
        await fleet.sleep()
        await handed_to_engines(fleet, 1)
        with pytest.raises(FleetLost, match="max_restarts=0"):
            fleet.check()
        await fleet.shutdown()

    asyncio.run(run())


def test_one_that_does_not_come_up_is_ended(actors: list[Actor]) -> None:
    """`sleep` waits for engines that are starting, but for rollout.timeout_s only."""

    class Third(Actor):
        async def answer(self, name: str, *args: Any) -> Any:
            if len(actors) > 2 and self is actors[2] and name == "start":
                await asyncio.sleep(1000)
            return await super().answer(name, *args)

    async def run() -> None:
        fleet = make_fleet(actors, Third, timeout_s=0.3)
        await fleet.start()
        actors[0].dead.set()
        await until(lambda: len(actors) == 3)
        await fleet.sleep()
        assert actors[2].dead.is_set() and fleet.engines[0].gone and fleet.engines[1].asleep
        await fleet.shutdown()

    asyncio.run(run())
