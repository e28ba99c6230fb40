"""The transport that engines are started with, by where they are placed."""

from __future__ import annotations

import pytest
from made.configs import run_config

from sfpo_megatron.rollout.controller import _with_chosen_transport
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.placement import Placement


def engines(*nodes: str, devices: tuple[str, ...] = ()) -> list[Placement]:
    return [Placement(node_id=node, devices=devices) for node in nodes]


@pytest.mark.parametrize(
    ("placements", "expected"),
    [
        (engines("here", "here"), "shm"),
        (engines("here", "here", devices=("6", "7")), "shm"),
        (engines("here", "there"), "gloo"),
        (engines("there", devices=("0",)), "nccl_stages"),
        ([Placement(node_id="there", devices=(), num_gpus=2)], "nccl_stages"),
    ],
)
def test_auto(placements: list[Placement], expected: str) -> None:
    found = _with_chosen_transport(run_config(), placements, own_node="here")
    assert found.refit.transport == expected


def test_shared_memory_does_not_reach_another_node() -> None:
    with pytest.raises(RolloutError, match=r"found shm .* expected one that .*; set it to auto"):
        _with_chosen_transport(
            run_config(refit={"transport": "shm"}), engines("here", "there"), own_node="here"
        )


def test_what_auto_stands_for_is_checked() -> None:
    config = run_config(rollout={"engine_args": {"worker_extension_cls": "mine.Worker"}})
    _with_chosen_transport(config, engines("here"), own_node="here")
    with pytest.raises(RolloutError, match=r"worker_extension_cls: found set with .*gloo"):
        _with_chosen_transport(config, engines("there"), own_node="here")
