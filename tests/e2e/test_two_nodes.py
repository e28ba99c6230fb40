"""A whole run on two Ray nodes, emulated on the loopback interface: an engine on each, weights over
gloo (`auto`, there) from both pipeline stages.

Not exercised: two machines; trainer ranks on the second node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import psutil
import pytest
from made.waiting import wait_for

pytestmark = pytest.mark.full


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, on 127.0.0.1 and 127.0.0.2."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**small, "node_ip_address": "127.0.0.1", "include_dashboard": False},
    )
    cluster.add_node(**small, node_ip_address="127.0.0.2")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def engine_parents() -> set[int]:
    """The raylets that have engines."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::Engine"):
                found.add(process.ppid())
        except psutil.NoSuchProcess:
            continue
    return found


def test_an_engine_on_each_node(cluster: Any, tmp_path: Path) -> None:
    model = digits.make_model(tmp_path / "model", layers=4)
    config = digits.write_config(
        tmp_path,
        model,
        parallel={"tensor": 1, "pipeline": 2},
        rollout={"num_engines": 2},
        refit={"bucket_bytes": 200_000, "verify_every": 1},
    )
    process = digits.start_train(config)
    try:
        wait_for(lambda: len(engine_parents()) == 2, timeout_s=120, what="two raylets' engines")
        output, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            digits.end(process)
    assert process.returncode == 0, output
    assert "refit by gloo" in output, output
    for index in range(2):  # what vLLM has chosen, at an engine's first start
        log = (tmp_path / f"run/logs/engine-{index}.log").read_text()
        assert re.search(r"\bINFO\b.*\[", log), log
    steps, _ = digits.read_metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["logprob_diff_mean"] < 1e-4 and line["num_engine_restarts"] == 0, line
