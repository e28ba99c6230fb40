"""A process of an engine is killed: one clear error within 10 s, and nothing stays behind.

Last in the folder: the engine that the other tests share is used up here. The rest of the processes
(EngineCore, actor, controller) is in `make test-full`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import fleet
import psutil
import pytest

from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import RolloutError


def kill_while_generating(client: RolloutClient, pid: int) -> tuple[str, float]:
    """The message that `collect` raises, and how long after the kill."""
    client.submit(
        fleet.make_request(
            "doomed", step=3, temperature=1.0, num_samples=8, max_response_tokens=250
        )
    )
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RolloutError) as error:
        client.collect("doomed")
    return str(error.value), time.monotonic() - began


def assert_nothing_left(client: RolloutClient) -> None:
    identities = fleet.processes_of(client)
    client.close()
    client.close()  # idempotent
    time.sleep(0.5)
    assert identities and not [i for i in identities if i.alive]


def process_of(client: RolloutClient, what: str) -> int:
    """The controller, the engine's actor (Ray titles both), EngineCore, or one of its workers."""
    processes = [psutil.Process(i.pid) for i in fleet.processes_of(client) if i.alive]
    titles = {process: " ".join(process.cmdline()) for process in processes}
    controller = next(p for p, title in titles.items() if "SwitchableController" in title)
    actor = next(p for p, title in titles.items() if "SwitchableEngine" in title)
    core = next(p for p in actor.children() if "spawn_main" in titles.get(p, ""))
    found = {"controller": controller, "actor": actor, "EngineCore": core}
    if what == "worker":
        return next(p.pid for p in core.children() if "spawn_main" in titles.get(p, ""))
    return found[what].pid


def test_killed_worker(untied_tp2: RolloutClient) -> None:
    shared = {path for p in fleet.processes_of(untied_tp2) for path in p.shared_memory()}
    assert len(shared) > 2
    message, seconds = kill_while_generating(untied_tp2, process_of(untied_tp2, "worker"))
    assert "engine 0 died while generating step 3" in message and "engine-0.log" in message
    assert seconds < 10
    assert_nothing_left(untied_tp2)
    assert not [path for path in shared if Path(path).exists()], "shared memory stays behind"


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("EngineCore", "engine 0 died while generating step 3"),
        ("actor", "engine 0 died while generating step 3"),
        ("controller", "the rollout controller died while collecting"),
    ],
)
def test_killed_process(what: str, message: str, start: Any, models: dict[str, Path]) -> None:
    client = start(models["tied_a"])
    client.wait_ready(300)
    found, seconds = kill_while_generating(client, process_of(client, what))
    assert message in found
    assert seconds < 10
    assert_nothing_left(client)
