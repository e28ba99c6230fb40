"""Weights that a run begins with in place of model.path's: who has them, with stand-ins for Ray's
actors.

Not exercised: real engines (tests/e2e/test_zz_dead_engine.py).
"""

from __future__ import annotations

import asyncio

import pytest
from made.fleets import Actor, job, make_fleet, until, update


@pytest.mark.parametrize("lost", ["before", "meanwhile", "after"])
def test_a_run_that_begins_with_other_weights_never_samples_from_model_path(
    actors: list[Actor], lost: str
) -> None:
    """Its weights are version 0, the number of those that an engine starts with."""

    async def run() -> None:
        fleet = make_fleet(actors)
        await fleet.start()
        if lost == "before":  # its successor is there when the update ends, and took no part
            actors[0].dead.set()
            await until(lambda: len(actors) == 3 and fleet.engines[0].ready)
            fleet.engines[0].ready = False
        await fleet.introduce({})
        await fleet.start_update(0, only_stale=False)
        if lost == "meanwhile":
            actors[0].dead.set()
        await fleet.load_bucket({}, 0)
        await until(lambda: lost != "meanwhile" or (len(actors) == 3 and fleet.engines[0].ready))
        await fleet.finish_update()
        if lost == "before":
            fleet.engines[0].ready = True
        if lost == "after":
            assert not fleet.wants_weights
            actors[0].dead.set()
            await until(lambda: len(actors) == 3 and fleet.engines[0].ready)
        assert fleet.wants_weights and fleet.can_generate
        made = await asyncio.gather(job(fleet, 5), job(fleet, 5))
        assert [m for m, _ in made] == [["made by 1"]] * 2 and not actors[2].seeds
        await update(fleet, 0, only_stale=True)
        assert not fleet.wants_weights and [e.version for e in fleet.engines] == [0, 0]
        await fleet.shutdown()

    asyncio.run(run())


def test_engines_of_another_controller_want_what_has_been_sent(actors: list[Actor]) -> None:
    async def run() -> None:
        fleet = make_fleet(actors, has_sent=True)
        await fleet.start()
        assert fleet.wants_weights and not fleet.can_generate
        await update(fleet, 0, only_stale=True)
        assert fleet.can_generate and not fleet.wants_weights
        await fleet.shutdown()

    asyncio.run(run())
