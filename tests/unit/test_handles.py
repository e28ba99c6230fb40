"""The Protocols of Ray's handles against the classes behind them: Ray itself checks no type.

Not exercised: that Ray carries the values (tests/e2e).
"""

from __future__ import annotations

import inspect
from typing import get_args, get_type_hints

import pytest

from sfpo_megatron.rollout import handles
from sfpo_megatron.rollout.controller import RolloutController
from sfpo_megatron.rollout.engine import Engine

PAIRS = [
    pytest.param(protocol, behind, name, id=f"{behind.__name__}.{name}")
    for protocol, behind in (
        (handles.EngineActor, Engine),
        (handles.ControllerActor, RolloutController),
    )
    for name in get_type_hints(protocol)
]


@pytest.mark.parametrize(("protocol", "behind", "name"), PAIRS)
def test_a_handle_asks_what_the_class_answers(protocol: type, behind: type, name: str) -> None:
    method = getattr(behind, name)
    assert inspect.iscoroutinefunction(method)
    found = get_type_hints(method)
    answer = found.pop("return")
    parameters, expected = get_args(get_type_hints(protocol)[name])
    # A wait for no value, a class of the wrong version or an argument too many: all differ here.
    assert list(parameters) == list(found.values())
    assert expected == answer


def test_every_remote_method_of_the_controller_is_in_its_protocol() -> None:
    public = {
        name
        for name, method in vars(RolloutController).items()
        if inspect.iscoroutinefunction(method) and not name.startswith("_")
    }
    assert public == set(get_type_hints(handles.ControllerActor))
