"""Engines that are started in the place of lost ones and do not come up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from made.fleets import Actor, job, make_fleet, until
from ray.exceptions import ActorUnschedulableError

from sfpo_megatron.rollout import slots
from sfpo_megatron.rollout.errors import FleetLost


@pytest.mark.parametrize("how", ["its node has left", "did not start again .it hangs"])
def test_engines_that_do_not_start_again_are_losses(
    actors: list[Actor], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Ray cannot place one whose node is gone; another hangs. The work goes on elsewhere, until
    they are more than rollout.max_restarts."""
    monkeypatch.setattr(slots, "START_S", 0.2)

    class Successor(Actor):
        async def answer(self, name: str, *args: Any) -> Any:
            if self in actors[2:]:
                if "node" in how:
                    raise ActorUnschedulableError("")
                if name == "start":
                    await asyncio.sleep(1000)
            return await super().answer(name, *args)

    async def run() -> None:
        fleet = make_fleet(actors, Successor, timeout_s=0.2, max_restarts=2)
        await fleet.start()
        actors[0].dead.set()
        assert (await job(fleet, 5))[0] == ["made by 1"]
        with pytest.raises(FleetLost, match=f"engine 0 .*{how}.*max_restarts=2"):
            await until(lambda: len(actors) == 4 and fleet.engines[0].lost)
            fleet.check()
        await fleet.shutdown()

    asyncio.run(run())
