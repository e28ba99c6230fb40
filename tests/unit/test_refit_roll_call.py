"""Leaders and engine workers meet in a store before any enters a communicator, here over gloo.

Not exercised: NCCL; engines of vLLM's (tests/e2e/test_kills.py kills a real one at this moment).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.roll_call import BROKEN, members, roll_call
from sfpo_megatron.resharding.streams import Streams

TIMEOUT_S = 4.0
WORKER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from sfpo_megatron.resharding.roll_call import members, roll_call
from sfpo_megatron.resharding.streams import broadcast, communicator, finish

host, port, number, timeout_s = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                      timeout=timedelta(seconds=timeout_s))
print("introduced", flush=True)
sys.stdin.readline()
try:
    roll_call(store, f"engine worker {number}", members([0], 2), timeout_s)
    group = communicator(store, "leader/0", rank=1 + number, size=3, backend="gloo",
                         timeout_s=timeout_s)
    bucket = torch.empty(64, dtype=torch.uint8)
    finish(broadcast(group, bucket), timeout_s, store)
    print(bucket[:16].view(torch.float32).tolist(), flush=True)
except RuntimeError as error:
    print(error, flush=True)
"""
"""A worker as `StagesEngine` is one: introduced, then told of the first round."""


class OneTensor:
    """A source and control of one rank, the leader."""

    rank, size = 0, 1
    leaders: ClassVar = [0]
    tensor = torch.arange(4.0)

    @property
    def control(self) -> OneTensor:
        return self

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name="w", shape=(4,), dtype=torch.float32)]

    def prepare(self) -> None:
        pass

    def gather(self, index: int) -> Tensor:
        return self.tensor

    def broadcast_json(self, value: Any) -> Any:
        return value

    def max(self, values: Tensor) -> Tensor:
        return values


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return Streams(OneTensor(), bucket_bytes=4096, backend="gloo", timeout_s=TIMEOUT_S)  # type: ignore[arg-type]


@pytest.fixture
def workers(streams: Streams) -> Iterator[Callable[[], list[subprocess.Popen[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> list[subprocess.Popen[str]]:
        address, port = streams.serve()
        for number in (0, 1):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, address, str(port), str(number), str(TIMEOUT_S)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
        for worker in started:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "introduced\n"
        streams.restart(fresh=True, verify=False)
        streams.attach({"address": address, "port": port, "num_workers": 2})
        streams.begin()
        return started

    yield start
    for worker in started:
        worker.kill()
        worker.wait()


def told_of_the_round(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("round 0\n")
    worker.stdin.flush()


def test_all_who_come_get_the_weights(
    streams: Streams, workers: Callable[[], list[subprocess.Popen[str]]]
) -> None:
    started = workers()
    for worker in started:
        told_of_the_round(worker)
    streams.next_round()
    assert streams.end()
    for worker in started:
        assert worker.communicate(timeout=60)[0] == "[0.0, 1.0, 2.0, 3.0]\n"


def test_one_that_died_before_the_first_broadcast_ends_it_in_time(
    streams: Streams,
    workers: Callable[[], list[subprocess.Popen[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By one message that names it; the other worker is not left waiting either."""
    comes, dies = workers()
    dies.kill()
    dies.wait()
    begun = time.monotonic()
    told_of_the_round(comes)
    with caplog.at_level(logging.WARNING):
        streams.next_round()
        assert not streams.end()
    assert time.monotonic() - begun < 2 * TIMEOUT_S
    answer = comes.communicate(timeout=60)[0]
    assert [record.getMessage() for record in caplog.records] == [
        "a refit broke off: engine worker 1 of 3 did not come within 4 s"
    ]
    assert "engine worker 1 of 3 did not come" in answer or "gave up" in answer


def test_the_roll_call_ends_where_a_leader_has_given_up() -> None:
    store = dist.HashStore()
    everybody = members([0, 4], 1)
    assert everybody == ["trainer rank 0", "trainer rank 4", "engine worker 0"]
    store.set(BROKEN, "")
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="a leader gave up"):
        roll_call(store, "engine worker 0", everybody, 60.0)
    assert time.monotonic() - begun < 5
