"""The scoring pool against responses that hang, crash or flood their process.

Everything here runs real processes, on a reward function of our own (hostile_verifier.py) that does
what a response says. Not exercised: a pool inside a Ray actor (tests/e2e).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made.processes import gone

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.pool import ScoringPool, VerifierError
from sfpo_megatron.rewards.wire import WireProblem

TIMEOUT_S = 0.5
HERE = str(Path(__file__).parent)
HOSTILE = "hostile_verifier:score"


def problem(answer="42", number=0):
    return WireProblem(id=f"p/{number}", question="?", answer=answer, metadata={"n": [1, "é"]})


@pytest.fixture(scope="module")
def hostile_pool(tmp_path_factory):
    run = RunDirectory.of(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE)
        config = RewardConfig(function=HOSTILE, timeout_s=TIMEOUT_S, num_workers=2)
        with ScoringPool(config, run) as pool:
            yield pool


def test_scores_come_back_in_order_and_prompts_are_not_mixed_up(hostile_pool):
    items = [(problem(str(i // 8), i // 8), str(i // 8 + i % 2)) for i in range(2000)]
    scores = hostile_pool.score(items)
    assert [s.correct for s in scores] == [i % 2 == 0 for i in range(2000)]
    assert [s.reward for s in scores] == [float(i % 2 == 0) for i in range(2000)]
    assert not any(s.timed_out for s in scores)
    assert hostile_pool.score([]) == []


@pytest.mark.parametrize("what", ["sleep", "loop", "loop-in-C", "catch-all"])
def test_a_response_that_hangs_is_cut_and_all_others_are_scored(hostile_pool, what):
    before = set(hostile_pool.worker_pids)
    items = [(problem(), "42")] * 5 + [(problem(), what)] + [(problem(), "42"), (problem(), "41")]
    start = time.monotonic()
    scores = hostile_pool.score(items)
    assert [s.timed_out for s in scores] == [False] * 5 + [True] + [False] * 2
    assert [s.reward for s in scores] == [1.0] * 5 + [0.0] + [1.0, 0.0]
    assert TIMEOUT_S <= time.monotonic() - start < 30
    (killed,) = before - set(hostile_pool.worker_pids)
    assert gone(killed)


@pytest.mark.parametrize("what", ["memory", "crash", "exit", "raise", "print"])
def test_a_response_that_harms_the_process_gets_0_and_harms_no_other(hostile_pool, what):
    items = [(problem(), "42"), (problem(), what), (problem(), "42")]
    scores = hostile_pool.score(items)
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0]
    assert not any(s.timed_out for s in scores)


@pytest.mark.parametrize(
    "what",
    [
        "read-requests",  # before the next, which leaves nothing to read
        *("close-descriptors", "close-streams", "detach-stream", "replace-streams"),
        *("change-directory", "handlers", "alarm", "fork-and-return"),
        *("thread", "surrogate"),
    ],
)
def test_what_a_response_leaves_behind_does_not_reach_the_next(hostile_pool, what):
    """The process goes on, and the next response finds it as it was."""
    before = set(hostile_pool.worker_pids)
    scores = hostile_pool.score([(problem(), text) for text in ("42", what, "tidy", "42", "41")])
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert not any(s.timed_out for s in scores)
    assert set(hostile_pool.worker_pids) == before


def test_a_response_that_closes_the_pipes_to_the_run_gets_0(hostile_pool):
    scores = hostile_pool.score([(problem(), text) for text in ("42", "close-all", "42", "tidy")])
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0, 1.0]


def test_a_verifier_of_ones_own_writes_files_up_to_a_limit(hostile_pool, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    items = [f"write {size} {file}" for size, file in ((1 << 20, small), (65 << 20, large))]
    scores = hostile_pool.score([(problem(), text) for text in (*items, "42")])
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0]
    assert small.stat().st_size == 1 << 20 and large.stat().st_size <= 64 << 20


def test_a_built_in_verifier_writes_no_file_and_has_no_torch(hostile_pool):
    with ScoringPool(RewardConfig(function="exact_match")) as pool:
        (pid,) = pool.worker_pids
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    (files,) = (line.split() for line in limits if line.startswith("Max file size"))
    assert files[3:5] == ["0", "0"]
    assert hostile_pool.score([(problem(), "torch")])[0].reward == 0.0


@pytest.mark.parametrize("answer", ["broken", "out of range"])
def test_a_broken_prompt_is_an_error_that_names_it(hostile_pool, answer):
    with pytest.raises(VerifierError, match="prompt p/7: "):
        hostile_pool.score([(problem(), "42"), (problem(answer, 7), "42")])
    # Results of the failed batch that were still on their way are not taken for the next one's.
    assert [s.reward for s in hostile_pool.score([(problem(), "41"), (problem(), "42")])] == [0, 1]


def test_workers_that_were_killed_while_idle_are_replaced(hostile_pool):
    for pid in hostile_pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
    assert [s.reward for s in hostile_pool.score([(problem(), "42")] * 4)] == [1.0] * 4


def test_threads_may_share_a_pool_and_end_before_it(hostile_pool):
    """A thread that ends takes no worker with it (PR_SET_PDEATHSIG would)."""
    results = {}

    def use(i):
        results[i] = hostile_pool.score([(problem(str(i)), str(i))] * 50)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(s.correct for i in range(4) for s in results[i])
    time.sleep(0.2)
    pids = hostile_pool.worker_pids
    assert all(s.correct for s in hostile_pool.score([(problem(), "42")] * 8))
    assert hostile_pool.worker_pids == pids


CHILD = """
import threading, time
from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem
pool = ScoringPool(RewardConfig(function="hostile_verifier:score", timeout_s=600, num_workers=5))
problem = WireProblem(id="p", question="?", answer="42", metadata={})
pool.score([(problem, "start-children CHILDREN")])
pool.score([(problem, "start-stubborn-child CHILDREN-stubborn")])
busy = ["loop-in-C", *(f"sleep {how}" for how in ("deaf", "blocked", "cut-off", "elsewhere"))]
items = [(problem, response) for response in busy]
busy = threading.Thread(target=pool.score, args=(items,), daemon=True)
busy.start()
time.sleep(0.5)
print(*pool.worker_pids, flush=True)
time.sleep(600)
"""


def test_killing_the_parent_leaves_no_worker_not_even_a_busy_one(tmp_path):
    """However deaf it has made itself; nor what a reward function has started."""
    children = tmp_path / "children"
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("CHILDREN", str(children))],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{HERE}"},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    stubborn = Path(f"{children}-stubborn")
    started = [int(pid) for file in (children, stubborn) for pid in file.read_text().split()]
    assert len(pids) == 5 and len(started) == 3
    time.sleep(0.5)  # all are busy
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all(gone(pid) for pid in pids + started)


@pytest.mark.parametrize("how", ["close", "time out"])
def test_what_a_reward_function_has_started_ends_with_its_process(monkeypatch, tmp_path, how):
    monkeypatch.setenv("PYTHONPATH", HERE)
    children = tmp_path / "children"
    with ScoringPool(RewardConfig(function=HOSTILE, timeout_s=TIMEOUT_S)) as pool:
        pool.score([(problem(), f"start-stubborn-child {children}")])
        if how == "time out":
            assert pool.score([(problem(), "sleep")])[0].timed_out
            assert all(gone(int(pid)) for pid in children.read_text().split())
    assert all(gone(int(pid)) for pid in children.read_text().split())


def test_close_ends_the_workers():
    pool = ScoringPool(RewardConfig(function="exact_match", num_workers=2))
    pids = pool.worker_pids
    assert len(pids) == 2
    pool.close()
    assert all(gone(pid, within_s=2) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([(problem(), "42")])


def test_reasoning_gym_prompts_through_the_pool():
    """The entry survives the trip as JSON: same scores as in this process."""
    from sfpo_megatron.config.tree import DataSource
    from sfpo_megatron.data.sources import source_rows
    from sfpo_megatron.rewards.reasoning_gym import score

    rows = [
        row
        for task in ("chain_sum", "countdown", "number_sorting")
        for row in source_rows(
            DataSource(source="reasoning_gym", task=task, size=20), seed=1, key="k", name=task
        )
    ]
    items = [(row, text) for row in rows for text in (row.answer, f"{row.answer}!", "x")]
    with ScoringPool(RewardConfig(timeout_s=20)) as pool:
        assert [s.reward for s in pool.score(items)] == [score(t, row) for row, t in items]
