"""How the other ranks help rank 0 while it works with engines, and hear that it cannot go on.

Not exercised: a real control group (the runs of tests/e2e/test_kills.py have two ranks).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from configs import run_config

from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run import engines as run_io

CONFIG = run_config()


class Control:
    """`broadcast_json` between two threads."""

    messages: queue.SimpleQueue[Any]

    def __init__(self, rank: int, messages: queue.SimpleQueue[Any]) -> None:
        self.rank, self.messages = rank, messages

    def broadcast_json(self, value: Any = None) -> Any:
        if self.rank == 0:
            self.messages.put(value)
            return value
        return self.messages.get(timeout=10)


class Refit:
    def __init__(self) -> None:
        self.sent: list[tuple[int, bool]] = []

    def send(self, version: int, *, resend: bool = False) -> None:
        self.sent.append((version, resend))


def on_both_ranks(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[Any, Callable[[], None]], Any]
) -> tuple[list[Any], list[Refit]]:
    """What `_on_main` gave or raised by rank, and the refits that each rank took part in."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ios, refits, outcomes = [], [Refit(), Refit()], [None, None]
    for rank in (0, 1):
        monkeypatch.setattr(run_io.dist, "get_rank", lambda rank=rank: rank)
        io: Any = run_io.RunIO(CONFIG)
        io._control, io._refit, io._weight_version = Control(rank, messages), refits[rank], 7
        io._feed = object() if rank == 0 else None
        ios.append(io)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = ios[rank]._on_main(work)
        except FleetLost as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a rank waits for ever"
    return outcomes, refits


def test_every_rank_takes_part_when_weights_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(feed: Any, resend: Callable[[], None]) -> str:
        resend()
        resend()
        return "rollouts"

    outcomes, refits = on_both_ranks(monkeypatch, work)
    assert outcomes == ["rollouts", None]
    assert [refit.sent for refit in refits] == [[(7, True)] * 2] * 2


def test_a_fleet_that_is_lost_is_said_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(feed: Any, resend: Callable[[], None]) -> None:
        raise FleetLost("engine 0 died")

    outcomes, refits = on_both_ranks(monkeypatch, work)
    assert [str(outcome) for outcome in outcomes] == ["engine 0 died"] * 2
    assert all(isinstance(outcome, FleetLost) for outcome in outcomes)
    assert not any(refit.sent for refit in refits)
