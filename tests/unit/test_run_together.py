"""How the other ranks help rank 0 while it works with engines, and hear that it cannot go on.

Not exercised: a real control group (the runs of tests/e2e/test_kills.py have two ranks).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sfpo_megatron.outputs.stopping import OutOfTime
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run.together import Together


class Control:
    """`broadcast_json` between two threads."""

    def __init__(self, rank: int, messages: queue.SimpleQueue[Any]) -> None:
        self.rank, self.messages = rank, messages

    def broadcast_json(self, value: Any = None) -> Any:
        if self.rank == 0:
            self.messages.put(value)
            return value
        return self.messages.get(timeout=10)


def on_both_ranks(work: Callable[[Callable[[], None]], Any]) -> tuple[list[Any], list[int]]:
    """What `run` gave or raised by rank, and how often each rank sent weights again."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outcomes: list[Any] = [None, None]
    resent = [0, 0]

    def run(rank: int) -> None:
        def resend() -> None:
            resent[rank] += 1

        try:
            outcomes[rank] = Together(Control(rank, messages)).run(work, resend)
        except (FleetLost, OutOfTime) as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a rank waits for ever"
    return outcomes, resent


def test_every_rank_takes_part_when_weights_are_wanted() -> None:
    def work(ask: Callable[[], None]) -> str:
        ask()
        ask()
        return "rollouts"

    outcomes, resent = on_both_ranks(work)
    assert outcomes == ["rollouts", None]
    assert resent == [2, 2]


@pytest.mark.parametrize("kind", [FleetLost, OutOfTime])
def test_what_ends_a_step_is_raised_on_every_rank(kind: type[Exception]) -> None:
    def work(ask: Callable[[], None]) -> None:
        raise kind("engine 0 died")

    outcomes, resent = on_both_ranks(work)
    assert [str(outcome) for outcome in outcomes] == ["engine 0 died"] * 2
    assert [type(outcome) for outcome in outcomes] == [kind] * 2
    assert resent == [0, 0]
