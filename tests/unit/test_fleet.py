"""The fleet's decisions, with stand-ins for Ray's actors: dispatch, loss, restart, versions.

Not exercised: processes, Ray, vLLM (tests/e2e/test_kills.py ends real ones).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from made.fleets import Actor, calls_of, job, make_fleet, until, update

from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.rollout.reports import EngineLoad
from sfpo_megatron.rollout.updates import UpdatableFleet as Fleet


def test_work_goes_to_the_fewest_outstanding_tokens(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        for actor in actors:
            actor.release.clear()
        jobs = []
        for number, tokens in enumerate((90, 20, 30, 20, 5)):
            jobs.append(job(fleet, tokens, (number,)))
            await asyncio.sleep(0)
        await until(lambda: sum(len(a.seeds) for a in actors) == 5)
        # 100 | 30, 30 + 40, 70 + 30, then both at 100: the first
        assert actors[0].seeds == [[0], [4]] and actors[1].seeds == [[1], [2], [3]]
        for actor in actors:
            actor.release.set()
        made = await asyncio.gather(*jobs)
        assert [m[0] for m, _ in made] == [f"made by {e}" for e in (0, 1, 1, 1, 0)]
        assert all(e.outstanding_tokens == 0 and e.num_calls == 0 for e in fleet.engines)
        await fleet.shutdown()

    asyncio.run(run())


def test_who_stops_waiting_frees_the_engine(actors: list[Actor]) -> None:
    """An environment with a limit of its own; the others are answered."""

    async def run() -> None:
        fleet = make_fleet(actors, num_engines=1)
        await fleet.start()
        actors[0].release.clear()
        given_up, other = job(fleet, 5, (7, 8)), job(fleet, 5, (9,))
        await until(lambda: len(actors[0].seeds) == 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(given_up, 0.02)
        await until(lambda: calls_of(actors[0], "cancelled"))
        assert (fleet.engines[0].num_calls, fleet.engines[0].outstanding_tokens) == (1, 5 + 10)
        actors[0].release.set()
        assert await other == (["made by 0"], 0)
        assert calls_of(actors[0], "cancelled") == [["generate"]] and fleet.num_reissued == 0
        assert (fleet.engines[0].num_calls, fleet.engines[0].outstanding_tokens) == (0, 0)
        await fleet.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_unfinished_work_of_a_lost_engine_is_issued_again(actors: list[Actor], how: str) -> None:
    async def run() -> None:
        fleet = make_fleet(actors, timeout_s=0.2)
        await fleet.start()
        actors[0].release.clear()
        first, second = job(fleet, 5, (7, 8)), job(fleet, 5, (9,))
        await until(lambda: actors[0].seeds and actors[1].seeds)
        if how == "dies":
            actors[0].dead.set()
        made = await asyncio.gather(first, second)
        assert [m for m, _ in made] == [["made by 1"] * 2, ["made by 1"]]
        assert actors[1].seeds == [[9], [7, 8]]  # the same seeds, elsewhere
        assert fleet.num_reissued == 2 and fleet.num_restarts == 1
        # Version 0 is the model's directory: the new one can work at once.
        await until(lambda: len(actors) == 3 and all(e.ready for e in fleet.engines))
        assert not fleet.wants_weights and actors[0].dead.is_set()
        await fleet.shutdown()

    asyncio.run(run())


def test_a_response_may_take_longer_than_an_engine_may_hang(actors: list[Actor]) -> None:
    """A call ends with its longest response; vLLM's steps say that it goes on."""

    class Steps(Actor):
        made, stuck = 0, False

        async def answer(self, name: str, *args: Any) -> Any:
            if name == "num_steps":
                self.made += not self.stuck
                return self.made
            return await super().answer(name, *args)

    async def run() -> None:
        fleet = make_fleet(actors, Steps, timeout_s=0.4)
        await fleet.start()
        actors[0].release.clear()
        first = job(fleet, 5, (7,))
        await until(lambda: actors[0].seeds)
        await asyncio.sleep(1.0)
        assert fleet.num_restarts == 0
        actors[0].stuck = True  # type: ignore[attr-defined]
        assert (await first)[0] == ["made by 1"] and fleet.num_restarts == 1
        await fleet.shutdown()

    asyncio.run(run())


def test_a_change_is_heard_from_the_call_on(actors: list[Actor]) -> None:
    """The task that waits may begin after it."""

    async def run() -> None:
        fleet = make_fleet(actors)
        change = asyncio.ensure_future(fleet.change())
        fleet.notify()
        await asyncio.wait_for(change, 5.0)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_failed_update_is_fatal_for_the_engine_alone(actors: list[Actor], how: str) -> None:
    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        await update(fleet, 1)
        if how == "hangs":
            actors[0].hangs.add("update_weights")
        await fleet.introduce({})
        await fleet.start_update(2, only_stale=False)
        if how == "dies":
            actors[0].dead.set()
        await fleet.load_bucket({}, 0)
        await fleet.finish_update()
        assert fleet.version == 2 and fleet.can_generate
        await until(lambda: fleet.wants_weights)
        assert fleet.needs_introduction()
        made = await asyncio.gather(job(fleet, 5), job(fleet, 5))
        assert [m for m, _ in made] == [["made by 1"]] * 2  # the new one gets no work yet
        assert [version for _, version in made] == [2, 2]
        # Only the one without weights takes part when they are sent again.
        await fleet.introduce({})
        await fleet.start_update(2, only_stale=True)
        assert [engine.index for engine in fleet._updating] == [0]
        await fleet.finish_update()
        assert not fleet.wants_weights and [e.version for e in fleet.engines] == [2, 2]
        await fleet.shutdown()

    asyncio.run(run())


async def interrupted_update(fleet: Fleet, actors: list[Actor], version: int) -> None:
    """The last of three engines dies in mid-update, which interrupts the others."""
    await fleet.introduce({"num_workers": 0, "engine_number": 0})
    await fleet.start_update(version, only_stale=False)
    actors[2].dead.set()
    actors[0].interrupted = actors[1].interrupted = True
    await fleet.load_bucket({}, 0)
    await fleet.finish_update()


def test_interrupted_engines_live_on_and_are_sent_everything_again(actors: list[Actor]) -> None:
    slowly: list[bool] = []

    class SlowActor(Actor):
        """One that is started later comes up when it is let."""

        def __init__(self, index: int) -> None:
            super().__init__(index)
            if slowly:
                self.may_start.clear()

    async def run() -> None:
        fleet = make_fleet(actors, SlowActor, transport="gloo", num_engines=3, tensor_parallel=2)
        await fleet.start()
        slowly.append(True)
        await interrupted_update(fleet, actors, 1)
        assert fleet.version == 1 and fleet.num_restarts == 1
        assert [e.interrupted for e in fleet.engines[:2]] == [True, True]
        assert not fleet.can_generate and fleet.wants_weights
        assert not actors[0].dead.is_set() and not actors[1].dead.is_set()
        # New communicators, with a place for the two; the third joins when it is there.
        work = job(fleet, 5)
        assert fleet.needs_introduction(only_stale=True)
        info = {"num_workers": 0, "engine_number": 0}
        assert await fleet.introduce(info, only_stale=True) == 2
        assert calls_of(actors[1], "init_weight_transfer_engine")[-1] == [
            {"num_workers": 4, "engine_number": 1}
        ]
        await fleet.start_update(1, only_stale=True)
        await fleet.finish_update()
        assert (await work)[1] == 1
        await until(lambda: len(actors) == 4)
        actors[3].may_start.set()
        await until(lambda: fleet.wants_weights)
        assert fleet.needs_introduction(only_stale=True)
        assert await fleet.introduce(info, only_stale=True) == 1
        assert calls_of(actors[3], "init_weight_transfer_engine") == [
            [{"num_workers": 2, "engine_number": 0}]
        ]
        await fleet.start_update(1, only_stale=True)
        await fleet.finish_update()
        assert [e.version for e in fleet.engines] == [1, 1, 1]
        assert fleet.needs_introduction()  # of all three together
        await fleet.introduce(info)
        assert not fleet.needs_introduction()
        await fleet.shutdown()

    asyncio.run(run())


def test_an_engine_that_is_interrupted_twice_is_lost(actors: list[Actor]) -> None:
    """So that a network that is gone ends the run."""

    async def run() -> None:
        fleet = make_fleet(actors, transport="gloo", num_engines=2, max_restarts=0)
        await fleet.start()
        for times in (1, 2):
            actors[0].interrupted = actors[1].interrupted = True
            await update(fleet, 1)
            assert actors[0].dead.is_set() == (times == 2)
        with pytest.raises(FleetLost, match=r"failed an update.*round 3.*max_restarts=0"):
            fleet.check()
        await fleet.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_all_that_share_vllms_own_broadcast_are_lost_as_one(actors: list[Actor], how: str) -> None:
    """All are lost at once when one dies; when one hangs, after refit.timeout_s."""

    async def run() -> None:
        fleet = make_fleet(
            actors,
            transport="nccl",
            refit_timeout_s=60.0 if how == "dies" else 0.2,
            num_engines=3,
            tensor_parallel=2,
            max_restarts=1,
        )
        await fleet.start()
        await fleet.introduce({"rank_offset": 1})
        assert [calls_of(a, "init_weight_transfer_engine") for a in actors] == [
            [[{"rank_offset": 1}]], [[{"rank_offset": 3}]], [[{"rank_offset": 5}]]
        ]  # fmt: skip
        await fleet.start_update(1, only_stale=False)
        for actor in actors if how == "dies" else actors[1:2]:
            actor.hangs.add("update_weights")
        if how == "dies":
            asyncio.get_running_loop().call_later(0.02, actors[1].dead.set)
        async with asyncio.timeout(20):
            await fleet.load_bucket({}, 0)
        await fleet.finish_update()
        assert all(actor.dead.is_set() for actor in actors[:3])
        fleet.check()
        await until(lambda: len(actors) == 6 and fleet.wants_weights)
        await fleet.shutdown()

    asyncio.run(run())


def test_a_trainer_that_meets_nobody_ends_the_run(actors: list[Actor]) -> None:
    """Three times in a row; with an update in between it goes on."""

    async def run() -> None:
        fleet = make_fleet(actors, transport="nccl")
        await fleet.start()
        for times in (2, 3):
            for _ in range(times):
                fleet.count_failed_meeting("no route")
                await fleet.start_update(1, only_stale=False)
                await fleet.finish_update()
                assert fleet.version == 1 and fleet.wants_weights
            if times == 2:
                await update(fleet, 1)
                assert not fleet.wants_weights
                fleet.forget_introductions()
                fleet.engines[0].version = 0
        with pytest.raises(FleetLost, match="no refit in 3 reached an engine: no route"):
            fleet.check()
        await fleet.shutdown()

    asyncio.run(run())


def test_an_idle_engine_that_hangs_is_noticed_by_the_next_refit(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        actors[1].hangs.add("init_weight_transfer_engine")
        await update(fleet, 1)
        assert actors[1].dead.is_set() and fleet.version == 1
        made = await asyncio.gather(job(fleet, 5), job(fleet, 5))
        assert [m for m, _ in made] == [["made by 0"]] * 2
        await fleet.shutdown()

    asyncio.run(run())


def test_work_waits_until_the_only_engine_has_weights_again(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors, num_engines=1)
        await fleet.start()
        await update(fleet, 1)
        actors[0].release.clear()
        work = job(fleet, 5)
        await until(lambda: actors[0].seeds)
        actors[0].dead.set()
        await until(lambda: fleet.wants_weights)
        assert not fleet.can_generate and not work.done()
        await update(fleet, 2, only_stale=True)
        made, version = await work
        assert made == ["made by 0"] and version == 2
        await fleet.shutdown()

    asyncio.run(run())


def test_one_loss_more_than_max_restarts_is_named(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors, num_engines=1, max_restarts=1)
        await fleet.start()
        actors[0].dead.set()
        await until(lambda: len(actors) == 2 and fleet.engines[0].ready)
        fleet.check()
        actors[1].dead.set()
        with pytest.raises(FleetLost, match=r"engine 0 died.*max_restarts=1"):
            await job(fleet, 5)
            await until(lambda: fleet.engines[0].lost)
            fleet.check()
        await fleet.shutdown()

    asyncio.run(run())


def test_the_load_is_of_the_engines_that_answer(actors: list[Actor]) -> None:
    """One that is dead or hung is left out: its watch replaces it, and no batch waits for it."""

    class Loaded(Actor):
        async def answer(self, name: str, *args: Any) -> Any:
            if name == "take_load" and name not in self.hangs:
                return EngineLoad(
                    kv_cache_usage=self.index / 10,
                    num_preemptions=self.index,
                    num_requests=2 * self.index,
                    queue_s=0.5 * self.index,
                    busy_s=1.0 + self.index,
                )
            return await super().answer(name, *args)

    async def run() -> None:
        fleet = make_fleet(actors, Loaded, num_engines=5)
        await fleet.start()
        actors[3].dead.set()
        actors[4].hangs.add("take_load")
        load = await fleet.take_load()
        assert load == EngineLoad(
            kv_cache_usage=0.2, num_preemptions=3, num_requests=6, queue_s=1.5, busy_s=2.0
        )
        await fleet.shutdown()

    asyncio.run(run())


def test_engines_that_start_say_what_they_are_at(
    actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says it in its log."""
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        fleet = make_fleet(actors)
        folder = fleet.log_file(0).parent
        folder.mkdir(parents=True)
        actors[0].may_start.clear()
        starting = asyncio.ensure_future(fleet.start())
        await until(lambda: fleet.engines[1].ready)
        assert fleet.starting == ("engine 0 is starting",)
        fleet.log_file(0).write_text("sfpo-megatron: now loading weights\n")
        assert fleet.starting == ("engine 0 is loading weights",)
        actors[0].may_start.set()
        await starting
        assert fleet.starting == ()
        await fleet.shutdown()

    asyncio.run(run())
