"""A process of an engine is killed: the request still gets every rollout, the same ones; with no
restart left, one clear error within 10 s. Nothing stays behind.

Last in the folder: it ends processes of the engine that the other tests share. Whole runs with
kills at random moments are in test_kills.py.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import fleet
import pytest
import tiny

from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import FleetLost, RolloutError
from sfpo_megatron.rollout.lifeline import shared_memory

REQUEST: dict[str, Any] = {
    "step": 3,
    "temperature": 1.0,
    "num_samples": 8,
    "max_response_tokens": 250,
}


def kill_while_generating(client: RolloutClient, pid: int) -> None:
    client.submit(fleet.make_request("doomed", **REQUEST))
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)


def assert_nothing_left(client: RolloutClient) -> None:
    identities = fleet.processes_of(client)
    client.close()
    client.close()  # idempotent
    time.sleep(0.5)
    assert identities and not [i for i in identities if i.alive]


@pytest.mark.full
def test_killed_worker(untied_tp2: RolloutClient, models: dict[str, Path], tmp_path: Path) -> None:
    """The engine is restarted, gets the weights that it had (not the directory's), and makes
    the same rollouts."""
    client = untied_tp2
    sender = Refit(
        fleet.make_config(models["untied_b"], tmp_path),
        source=fleet.StateSource(tiny.load_state(models["untied_b"])),
        client=client.sync_client,
    )
    if client.health().weight_version != 3:  # test_refit was not run
        sender.send(3)
    client.submit(fleet.make_request("whole", **REQUEST))
    whole = client.collect("whole")

    shared = {path for p in fleet.processes_of(client) for path in shared_memory(p.pid)}
    assert len(shared) > 2
    kill_while_generating(client, fleet.process_of(client, "worker"))
    made = client.collect_scored("doomed", lambda: sender.send(3, only_stale=True) and None)
    assert len(made.rollouts) == len(fleet.PROMPTS) * 8
    assert made.num_restarts == 1 and made.num_reissued > 0
    assert {rollout.weight_version for rollout in made.rollouts} == {3}
    assert [r.token_ids for r in made.rollouts] == [r.token_ids for r in whole]
    assert not [path for path in shared if Path(path).exists()], "shared memory stays behind"
    sender.close()
    assert_nothing_left(client)


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "EngineCore",
            "engine 0 died while generating .*killed by SIGKILL.*engine-0.log.*max_restarts=0",
        ),
        ("actor", "engine 0 died while generating .*engine-0.log.*max_restarts=0"),
        ("controller", "the rollout controller died while collecting .*max_restarts=0"),
    ],
)
def test_with_no_restart_left(what: str, message: str, start: Any, models: dict[str, Path]) -> None:
    client = start(models["tied_a"], max_restarts=0)
    client.wait_ready(300)
    kill_while_generating(client, fleet.process_of(client, what))
    began = time.monotonic()
    with pytest.raises(FleetLost, match=message):
        client.collect("doomed")
    assert time.monotonic() - began < 10
    assert_nothing_left(client)


@pytest.mark.full
def test_killed_controller(start: Any, models: dict[str, Path]) -> None:
    """Another is started with its engines, and the step is issued again: the same rollouts."""
    client = start(models["tied_a"])
    client.wait_ready(300)
    client.submit(fleet.make_request("whole", **REQUEST))
    whole = client.collect("whole")
    kill_while_generating(client, fleet.process_of(client, "controller"))
    made = client.collect("doomed")
    assert [r.token_ids for r in made] == [r.token_ids for r in whole]
    assert client.num_controller_restarts == 1
    with pytest.raises(RolloutError, match="never submitted"):
        client.collect("unheard-of")
    assert_nothing_left(client)


@pytest.mark.full
def test_killed_controller_of_a_run_that_began_with_other_weights(
    start: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """They were sent as version 0: the new engines, which hold model.path's, wait for them."""
    client = start(models["untied_a"])
    client.wait_ready(300)
    sender = Refit(
        fleet.make_config(models["untied_b"], tmp_path),
        source=fleet.StateSource(tiny.load_state(models["untied_b"])),
        client=client.sync_client,
    )
    sender.send(0)
    client.submit(fleet.make_request("whole", **REQUEST))
    whole = client.collect("whole")
    kill_while_generating(client, fleet.process_of(client, "controller"))
    made = client.collect("doomed", lambda: sender.send(0, only_stale=True) and None)
    assert [r.token_ids for r in made] == [r.token_ids for r in whole]
    sender.close()
    assert_nothing_left(client)
