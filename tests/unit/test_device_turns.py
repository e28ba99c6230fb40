"""Turns on shared devices, in the order in which memory is given and taken.

Offload, engines and ranks are stand-ins that note what they are asked for; real ones:
tests/dist/test_offload.py, tests/e2e/test_colocated.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sfpo_megatron.mcore.offload import residue
from sfpo_megatron.run.device_turns import Turns


class Noted:
    """A policy's offload, a control group and engines."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.is_offloaded = False

    def offload(self) -> None:
        self.is_offloaded = True
        self.events.append("offload")

    def onload(self) -> None:
        self.is_offloaded = False
        self.events.append("onload")

    def turns(self) -> Turns:
        note = self.events.append
        self.make_room = lambda: note("drop gradients")
        control: Any = SimpleNamespace(barrier=lambda: note("all ranks"))
        return Turns(
            self,  # type: ignore[arg-type]
            control,
            sleep=lambda: note("sleep"),
            wake=lambda memory: note(f"wake {memory}"),
        )


TO_ENGINES = [
    "drop gradients",
    "all ranks",  # an engine may share the devices of several ranks
    "wake weights",
    "refit",
    "offload",
    "all ranks",
    "wake kv_cache",
]


def test_memory_is_free_on_all_ranks_before_engines_take_it() -> None:
    noted = Noted()
    turns = noted.turns()
    assert not turns.is_engines
    turns.to_trainer()  # it has the devices
    for _ in range(2):
        noted.events.clear()
        with turns.to_engines():
            assert not turns.is_engines
            noted.events.append("refit")
        assert noted.events == TO_ENGINES and turns.is_engines
        turns.to_trainer()
        assert noted.events == [*TO_ENGINES, "sleep", "onload"] and not turns.is_engines


def test_the_devices_come_back_once_the_engines_have_ended() -> None:
    """On every rank; where the trainer has them the engines are left to who ends them."""
    noted = Noted()
    turns = noted.turns()
    turns.end_engines(lambda: noted.events.append("close"))
    assert not noted.events
    with turns.to_engines():
        pass
    noted.events.clear()
    turns.end_engines(lambda: noted.events.append("close"))
    assert noted.events == ["close", "all ranks", "onload"]


def test_what_stays_is_said_in_gib() -> None:
    gib = 2**30
    assert residue(reserved=gib // 2, free=60 * gib, total=80 * gib) == (
        "the trainer's tensors keep 0.50 GiB while engines have the device, of which 20.00 of 80.0 "
        "GiB are in use: contexts, libraries, the engine's weights too"
    )
