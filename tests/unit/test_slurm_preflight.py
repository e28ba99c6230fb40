"""The preflight's judgement: which node is named for which fault. Not exercised: nvidia-smi."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.slurm import preflight
from sfpo_megatron.slurm.bandwidth import complaints, rounds, slow_nodes

GOOD: dict[str, Any] = {
    "gpus": ["NVIDIA H100 80GB HBM3, 570.1"] * 8,
    "cores": 8,
    "shm_bytes": 1 << 40,
    "clock": 1000.0,
    "address": "10.0.0.1",
    "gloo_fault": None,
    "same": {"python": "3.12.3", "torch": "2.13.0"},
}


def reports(**changes: Any) -> dict[str, dict[str, Any]]:
    """Four good nodes, but for `c`."""
    return {node: copy.deepcopy(GOOD) | (changes if node == "c" else {}) for node in "abcd"}


def test_good_nodes_have_no_fault() -> None:
    assert preflight.faults(reports(), num_gpus=8) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpus": GOOD["gpus"][:7]}, "c: found 7 GPUs, expected 8"),
        (
            {"gpus": ["NVIDIA H100 80GB HBM3, 550.9"] * 8},
            "c: found GPU and driver NVIDIA H100 80GB HBM3, 550.9, expected NVIDIA H100 80GB HBM3, "
            "570.1 as on most nodes",
        ),
        (
            {"cores": 1},
            "c: found 1 usable cores, expected one for each of its 8 GPUs or more; ask for them "
            "(--sbatch=--cpus-per-task=N)",
        ),
        ({"shm_bytes": 64 << 20}, "c: found 64 MiB free in /dev/shm, expected 1024 or more"),
        (
            {"address": "127.0.1.1"},
            "c: found no address of its own but 127.0.1.1, expected one that other nodes reach; "
            "set GLOO_SOCKET_IFNAME to its network interface",
        ),
        (
            {"address": "127.0.1.1", "gloo_fault": "found no interface ib7, ..."},
            "c: found no interface ib7, ...",
        ),
        ({"clock": 1100.0}, "c: its clock is +100 s off the others'"),
        (
            {"same": {"python": "3.12.3", "torch": "2.12.1"}},
            "c: found torch 2.12.1, expected 2.13.0 as on most nodes",
        ),
    ],
)
def test_the_bad_node_is_named(changes: dict[str, Any], expected: str) -> None:
    assert preflight.faults(reports(**changes), num_gpus=8) == [expected]


def test_this_machine_reports_itself() -> None:
    one = preflight.report()
    assert one["same"]["torch"] != "none" and one["same"]["sfpo-megatron"] != "none"
    assert one["shm_bytes"] > 0 and one["cores"] > 0
    json.dumps(one)


def test_a_late_report_is_waited_for_and_a_missing_one_is_not_there(tmp_path: Path) -> None:
    def write_late() -> None:
        time.sleep(0.3)
        (tmp_path / "preflight-1.json").write_text(json.dumps(GOOD))

    (tmp_path / "preflight-0.json").write_text(json.dumps(GOOD))
    writer = threading.Thread(target=write_late)
    writer.start()
    assert preflight.collect(tmp_path, ["a", "b"], 20).keys() == {"a", "b"}
    writer.join()
    assert preflight.collect(tmp_path, ["a", "b", "c"], 0.2).keys() == {"a", "b"}


def test_a_node_without_a_report_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setattr(preflight, "_WAIT_S", 0.2)
    assert preflight.main(["--dir", str(tmp_path), "--gpus=0", "near", "far"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("preflight: far: no report in") for line in lines)
    assert not any(line.startswith("preflight: near: no report") for line in lines)


@pytest.mark.parametrize("num_nodes", range(1, 9))
def test_every_node_is_measured_with_two_others_and_once_a_round(num_nodes: int) -> None:
    pairs = [pair for one in rounds(num_nodes) for pair in one]
    assert len(set(map(frozenset, pairs))) == len(pairs)
    degree = [sum(node in pair for pair in pairs) for node in range(num_nodes)]
    assert degree == [min(num_nodes - 1, 2)] * num_nodes
    for one in rounds(num_nodes):
        nodes = [node for pair in one for node in pair]
        assert len(set(nodes)) == len(nodes), "a node in two pairs at the same time"


def test_the_node_with_two_slow_pairs_is_the_slow_one() -> None:
    fast, slow = 40.0, 3.0
    pairs = {(0, 1): fast, (2, 3): slow, (1, 2): slow, (3, 0): fast}
    assert slow_nodes(pairs, 20.0) == {2: slow}


def test_one_slow_pair_names_both() -> None:
    pairs = {(0, 1): 40.0, (2, 3): 3.0, (1, 2): 40.0, (3, 0): 40.0}
    assert slow_nodes(pairs, 20.0) == {2: 3.0, 3: 3.0}
    assert slow_nodes({(0, 1): 3.0}, 20.0) == {0: 3.0, 1: 3.0}
    assert slow_nodes({(0, 1): 30.0}, 20.0) == {}


@pytest.mark.parametrize(("num_slow", "names_limit"), [(0, False), (1, False), (3, True)])
def test_where_all_nodes_are_slow_the_limit_is_named(num_slow: int, names_limit: bool) -> None:
    """Such as nodes with 100 Gbit/s, or without NVLink: nobody would be left."""
    slow = {node: 11.5 + node for node in range(num_slow)}
    limit = "SFPO_MIN_GB_S_BETWEEN_NODES"
    lines = complaints("abc", slow, least=20.0, where="with its neighbours", variable=limit)
    assert len(lines) == num_slow and all("--exclude=NODE" in line for line in lines)
    assert all((f"set {limit} in env.sh if" in line) == names_limit for line in lines)
    if slow:
        assert lines[0].startswith(
            "a: found 11.5 GB/s in an all-reduce with its neighbours, expected 20 or more; "
        )


def test_a_driver_that_torch_cannot_use_ends_the_job_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over gloo and the processors a node would look slow."""
    from sfpo_megatron.host.gpus import VISIBLE, Driver
    from sfpo_megatron.slurm import bandwidth

    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(bandwidth, "driver", lambda: Driver(version="570.86.15", num_gpus=8))
    monkeypatch.setattr(bandwidth.dist, "init_process_group", lambda *a, **k: pytest.fail("late"))
    assert bandwidth.main(["--in-node", "1", "--between-nodes", "1", "n7"]) == 3
    assert "preflight: n7: found driver 570.86.15 with 8 GPUs" in capsys.readouterr().err
