"""What an engine's listener adds up of vLLM's statistics, and what the metrics make of it.

tests/e2e has the statistics of real engines; here each is written out.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from made.rollouts import group, scored_request

from sfpo_megatron.rollout.engine_load import LoadListener, covered
from sfpo_megatron.rollout.reports import EngineLoad, RolloutTimes
from sfpo_megatron.run.metrics import rollout_metrics


@dataclass
class Finished:
    queued_time: float
    inference_time: float


@dataclass
class Step:
    finished_requests: list[Finished] = field(default_factory=list)
    num_preempted_reqs: int = 0


@dataclass
class Scheduled:
    kv_cache_usage: float


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_queue_and_busy_time_of_a_generation() -> None:
    """Requests that ran together count once, and what none ran in not at all."""
    clock = Clock()
    listener = LoadListener(clock)
    clock.now = 110.0
    listener.record(Scheduled(0.5), Step([Finished(1.0, 4.0), Finished(0.0, 3.0)], 1))  # 106-110
    listener.record(Scheduled(0.75), Step())  # goes on
    listener.record(None, None)
    clock.now = 112.0
    listener.record(Scheduled(0.25), Step([Finished(3.0, 3.0)], 2))  # 109-112
    clock.now = 120.0
    listener.record(Scheduled(0.0), Step([Finished(0.0, 2.0)]))  # 118-120
    load = listener.take()
    assert load == EngineLoad(
        kv_cache_usage=0.75, num_preemptions=3, num_requests=4, queue_s=4.0, busy_s=8.0
    )
    assert load.mean_queue_s == 1.0 and load.busy_in(16.0) == 0.5
    assert listener.num_steps == 5


def test_each_load_is_since_the_last_one() -> None:
    clock = Clock()
    listener = LoadListener(clock)
    clock.now = 110.0
    listener.record(Scheduled(1.0), Step([Finished(1.0, 4.0)], 1))
    listener.take()
    clock.now = 111.0
    listener.record(Scheduled(0.1), Step([Finished(0.0, 6.0)]))  # had begun before
    assert listener.take() == EngineLoad(
        kv_cache_usage=0.1, num_preemptions=0, num_requests=1, queue_s=0.0, busy_s=1.0
    )
    nothing = listener.take()
    assert (nothing.num_requests, nothing.mean_queue_s, nothing.busy_in(1.0)) == (0, 0.0, 0.0)


def test_a_request_that_was_aborted_in_the_queue() -> None:
    """It was never scheduled: vLLM's differences are of times that are 0."""
    listener = LoadListener(Clock())
    listener.record(Scheduled(0.0), Step([Finished(-5000.0, -7.0)]))
    load = listener.take()
    assert (load.num_requests, load.queue_s, load.busy_s) == (1, 0.0, 0.0)


def test_the_names_in_vllms_statistics() -> None:
    """Read in the installed vllm, which takes long to import."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = Path(vllm.origin).parent / "v1/metrics/stats.py"
    names: dict[str, set[str]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found = names[node.name] = set()
            for part in ast.walk(node):
                if isinstance(part, ast.AnnAssign | ast.Assign):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    found |= {ast.unparse(target).removeprefix("self.") for target in targets}
    assert {"queued_time", "inference_time"} <= names["FinishedRequestStats"]
    assert {"finished_requests", "num_preempted_reqs"} <= names["IterationStats"]
    assert "kv_cache_usage" in names["SchedulerStats"]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0.0),
        ([(1.0, 2.0), (2.0, 3.0)], 2.0),
        ([(5.0, 6.0), (0.0, 10.0), (9.0, 11.0)], 11.0),
        ([(0.0, 1.0), (4.0, 6.0), (0.5, 2.0)], 4.0),
    ],
)
def test_seconds_that_spans_cover(spans: list[tuple[float, float]], seconds: float) -> None:
    assert covered(spans) == seconds


@pytest.mark.parametrize(("generate_s", "busy"), [(1.5, 0.5), (0.5, 1.0), (0.0, 0.0)])
def test_the_metrics_of_a_steps_rollouts(generate_s: float, busy: float) -> None:
    """0.75 s of an engine, four requests that waited 2 s together."""
    scored = scored_request(group("a", [1.0, 0.0]))
    scored = replace(scored, times=RolloutTimes(generate_s=generate_s, reward_s=0.0))
    found = rollout_metrics(scored, staleness=0)
    assert found["engines/queue_s"] == 0.5 and found["engines/busy"] == busy
