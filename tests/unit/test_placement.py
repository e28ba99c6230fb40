"""Engines on nodes: every device once, an engine on one node, colocated ones where their ranks are.

Not exercised: Ray itself (tests/e2e/test_two_nodes.py starts engines on two Ray nodes).
"""

from __future__ import annotations

import pytest

from sfpo_megatron.rollout.placement import (
    Node,
    PlacementError,
    RankDevice,
    place_engines,
)


def cluster(num_nodes: int, num_devices: int = 8) -> list[Node]:
    return [
        Node(id=f"node-{n}", address=f"10.0.0.{n}", devices=tuple(map(str, range(num_devices))))
        for n in range(num_nodes)
    ]


def ranks(num: int, per_node: int = 8, first_node: int = 0) -> list[RankDevice]:
    return [
        RankDevice(address=f"10.0.0.{first_node + r // per_node}", device=str(r % per_node))
        for r in range(num)
    ]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", range(1, 9))
def test_colocated_engines_have_the_devices_of_their_ranks(num_nodes: int, size: int) -> None:
    nodes, trainer = cluster(num_nodes), ranks(8 * num_nodes)
    arguments = {"tensor_parallel": size, "placement": "colocated"}
    if 8 % size and num_nodes > 1:  # some engine would straddle two nodes
        with pytest.raises(PlacementError, match="nodes, expected one"):
            place_engines(nodes, trainer, num_engines=8 * num_nodes // size, **arguments)
        return
    found = place_engines(nodes, trainer, num_engines=8 * num_nodes // size, **arguments)
    assert [rank for place in found for rank in place.ranks] == list(range(len(found) * size))
    for place in found:
        for rank, device in zip(place.ranks, place.devices, strict=True):
            assert place.node_id == f"node-{rank // 8}" and device == str(rank % 8)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("trainer_ranks", [0, 4, 8])
def test_dedicated_engines_share_nothing(num_nodes: int, size: int, trainer_ranks: int) -> None:
    nodes, trainer = cluster(num_nodes), ranks(trainer_ranks)
    fit = (8 - trainer_ranks) // size + (num_nodes - 1) * (8 // size)
    arguments = {"tensor_parallel": size, "placement": "dedicated"}
    found = place_engines(nodes, trainer, num_engines=fit, **arguments)
    used = [(place.node_id, device) for place in found for device in place.devices]
    used += [(f"node-{rank.address[-1]}", rank.device) for rank in trainer]
    assert len(set(used)) == len(used) == fit * size + trainer_ranks
    assert all(len(place.devices) == size and not place.ranks for place in found)
    assert not any(place.num_gpus for place in found)
    with pytest.raises(PlacementError, match=f"found {fit + 1} .*at most {fit} "):
        place_engines(nodes, trainer, num_engines=fit + 1, **arguments)


@pytest.mark.parametrize("size", range(1, 9))
def test_where_ray_has_the_engines_devices_alone_it_chooses(size: int) -> None:
    fit = 2 * (8 // size)
    arguments = {"tensor_parallel": size, "placement": "dedicated"}
    found = place_engines(cluster(2), None, num_engines=fit, **arguments)
    assert all(place.num_gpus == size and not place.devices for place in found)
    assert sum(place.node_id == "node-0" for place in found) == fit // 2
    with pytest.raises(PlacementError, match=f"at most {fit} "):
        place_engines(cluster(2), None, num_engines=fit + 1, **arguments)


def test_colocated_engines_need_nothing_of_ray() -> None:
    """It may have been started without a GPU: the ranks say where theirs are."""
    found = place_engines(
        cluster(2, 0), ranks(16), num_engines=4, tensor_parallel=4, placement="colocated"
    )
    assert [place.node_id for place in found] == ["node-0", "node-0", "node-1", "node-1"]
    assert [place.devices for place in found] == [tuple("0123"), tuple("4567")] * 2
    assert not any(place.num_gpus for place in found)


def test_nodes_without_devices_take_turns() -> None:
    found = place_engines(
        cluster(2, 0), [], num_engines=3, tensor_parallel=2, placement="dedicated"
    )
    assert [place.node_id for place in found] == ["node-0", "node-1", "node-0"]
    assert not any(place.devices for place in found)


def test_a_rank_outside_the_cluster_is_named() -> None:
    with pytest.raises(PlacementError, match=r"rank 0 is on 10\.0\.0\.7, which is no node"):
        place_engines(
            cluster(2), ranks(8, first_node=7), num_engines=1, tensor_parallel=1,
            placement="colocated",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("listed", "trainer", "expected"),
    [
        ("4,5,6,7", "4,5", ["6", "7"]),
        ("7,6,5,4", "7,6", ["5", "4"]),
        ("GPU-a,GPU-b,GPU-c", "GPU-a", ["GPU-b", "GPU-c"]),
        ("MIG-a,MIG-b", "MIG-a", ["MIG-b"]),
    ],
)
def test_engines_stay_among_the_devices_that_the_run_was_given(
    listed: str, trainer: str, expected: list[str]
) -> None:
    """Part of a machine: its other devices are somebody else's."""
    node = Node(id="n", address="host", devices=tuple(listed.split(",")))
    taken = [RankDevice(address="host", device=name) for name in trainer.split(",")]
    arguments = {"tensor_parallel": 1, "placement": "dedicated"}
    found = place_engines([node], taken, num_engines=len(expected), **arguments)
    assert [place.devices for place in found] == [(name,) for name in expected]
    with pytest.raises(PlacementError, match=f"at most {len(expected)} "):
        place_engines([node], taken, num_engines=len(expected) + 1, **arguments)
