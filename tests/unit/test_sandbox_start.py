"""Interpreters that start slowly: what counts is the time of the program."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.rewards import CannotBeJudged, code
from sfpo_megatron.rewards.judge import Judge
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem
from sfpo_megatron.sandbox import interpreter
from sfpo_megatron.sandbox.interpreter import Trial
from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.kept_interpreter import Session
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.tools import ToolError
from sfpo_megatron.tools.python import python, warm_up


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node where hundreds of interpreters are started at once."""
    later = ("sh", "-c", 'sleep 1; exec "$@"', "sh", *interpreter.command())
    monkeypatch.setattr(interpreter, "command", lambda: list(later))


def test_the_time_of_a_program_begins_with_it(slow_start: None) -> None:
    assert python("6 * 7", timeout_s=0.5) == "42"
    assert "took longer than 0.5 s" in python("while True: pass", timeout_s=0.5)
    assert python("print('to' + 'o')\nimport time\ntime.sleep(600)", timeout_s=0.5) == (
        "too\n[ended: it took longer than 0.5 s]"
    )


def test_the_time_of_a_row_s_tests_begins_with_the_program(slow_start: None) -> None:
    tests = ["assert f(1) == 2", {"input": "", "output": ""}]
    found = code.passed("def f(n): return 2 * n", code.tests_of(json.dumps(tests)), 0.9)
    assert found == [True, True]


def test_a_request_is_longer_than_a_pipe_holds(slow_start: None) -> None:
    text = "x" * 300_000
    assert python(f"len({text!r})", timeout_s=5.0) == "300000"
    tests = [{"input": text, "output": "300000"}]
    program = "print(len(input()))"
    assert code.passed(program, code.tests_of(json.dumps(tests)), 5.0) == [True]


def test_an_interpreter_that_does_not_start_is_no_program_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interpreter, "command", lambda: ["sleep", "600"])
    monkeypatch.setattr(interpreter, "START_S", 0.3)
    with pytest.raises(ToolError, match=r"an interpreter did not start within 0\.3 s"):
        python("1", timeout_s=60.0)
    with pytest.raises(CannotBeJudged, match="programs cannot be tried on this machine now"):
        code.passed("pass", code.tests_of('[{"input": "", "output": ""}]'), 60.0)


def test_an_interpreter_that_ends_before_its_program_is_no_program_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`unshare` where no more processes may be, a limit that is refused."""
    failing = ["sh", "-c", "echo 'unshare: fork failed'; exit 1"]
    monkeypatch.setattr(interpreter, "command", lambda: failing)
    with pytest.raises(ToolError, match="an interpreter ended with 1 before its program began"):
        python("6 * 7", timeout_s=5.0)
    with pytest.raises(CannotBeJudged, match="an interpreter ended with 1"):
        code.passed("def f(n): return 2 * n", code.tests_of('["assert f(1) == 2"]'), 5.0)
    with pytest.raises(ToolError, match="its program began; it printed: unshare: fork failed"):
        warm_up()


def test_more_memory_than_the_machine_lets_a_process_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 30, 1 << 30))
    with pytest.raises(
        ValueError, match=r"^memory_mib: found 1025, expected at most 1024, .*lower"
    ):
        warm_up(memory_mib=1025)
    warm_up(memory_mib=1024)


def test_a_fork_that_is_refused_is_no_program_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory or processes are left once the first tests have been tried."""
    bootstrap = (
        "import os, sys; sys.path.insert(0, os.path.dirname(sys.argv[1])); import program\n"
        "fork, left = os.fork, [1]\n"
        "def refused():\n  if not left: raise BlockingIOError\n  left.pop()\n  return fork()\n"
        "os.fork = refused; sys.argv[0] = sys.argv[1]; sys.exit(program.main())"
    )
    tests = code.tests_of('["assert f(1) == 2", "assert f(2) == 4"]')
    whole = interpreter.command()
    refusing = [
        *isolation().command,
        sys.executable,
        "-I",
        "-c",
        bootstrap,
        str(interpreter._BOOTSTRAP),
    ]
    monkeypatch.setattr(interpreter, "command", lambda: refusing)
    with pytest.raises(DidNotStart, match="an interpreter ended with 1 between two trials"):
        interpreter.run_trials("", [Trial(), Trial()], timeout_s=5.0, memory_bytes=512 << 20)
    started = iter([refusing])
    monkeypatch.setattr(interpreter, "command", lambda: next(started, whole))
    assert code.passed("def f(n): return 2 * n", tests, 5.0) == [True, True]


@pytest.mark.parametrize("num_faults", [1, 2, 9])
def test_a_fault_of_the_machine_is_no_reward(
    monkeypatch: pytest.MonkeyPatch, num_faults: int
) -> None:
    """One that has passed costs nothing; one that stays ends the run, and scores no response 0."""
    faults = iter([OSError(errno.ENOSPC, "No space left on device")] * num_faults)

    def full(code_: str, *args: Any, **more: Any) -> Any:
        for fault in faults:
            raise fault
        return interpreter.run_trials(code_, *args, **more)

    monkeypatch.setattr(code, "run_trials", full)
    here: Any = SimpleNamespace(restore=lambda: None)  # the test's own streams stay as they are
    prompt = WireProblem(id="p", question="?", answer='["assert f(1) == 2"]', metadata={})
    judge = Judge(code.score, batched=False, surroundings=here)
    verdict = judge.verdict("```python\ndef f(n): return 2 * n\n```", prompt)
    if num_faults == 1:
        assert verdict["reward"] == 1.0
    else:
        assert "No space left on device" in verdict["unjudged"] and "reward" not in verdict


def test_what_this_program_alone_cannot_have_is_its_own_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def picky(code_: str, *args: Any, **more: Any) -> Any:
        if code_:
            raise DidNotStart("an interpreter ended with -9 before its program began")
        return interpreter.run_trials(code_, *args, **more)

    monkeypatch.setattr(code, "run_trials", picky)
    tests = code.tests_of('["assert f(1) == 2"]')
    assert code.passed("def f(n): return 2 * n", tests, 5.0) == [False]


def test_what_has_ended_in_time_counts_though_nobody_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This process was not scheduled: half of the time passes before it waits at all."""
    started = subprocess.Popen

    def late(*args: Any, **kwargs: Any) -> Any:
        process = started(*args, **kwargs)
        time.sleep(1.5)
        return process

    monkeypatch.setattr(subprocess, "Popen", late)
    assert python("6 * 7", timeout_s=0.3) == "42"
    assert code.passed("", code.tests_of('[{"input": "", "output": ""}]'), 0.3) == [True]


def test_more_descriptors_than_select_takes() -> None:
    pipes = [os.pipe() for _ in range(520)]
    try:
        session = Session(memory_bytes=512 << 20)
        assert session.run("6 * 7", timeout_s=5.0).output == "42\n"
        session.close()
        config = RewardConfig(function="last_number", num_workers=1)
        with ScoringPool(config) as pool:
            problem = WireProblem(id="p/0", question="?", answer="4", metadata={})
            assert pool.score([(problem, "4")])[0].reward == 1
    finally:
        for pipe in pipes:
            os.close(pipe[0])
            os.close(pipe[1])


def test_conditions_are_tried_together_and_one_by_one_where_that_does_not_end() -> None:
    many = [f"assert f({number}) == {2 * number}" for number in range(300)]
    assert all(code.passed("def f(n): return 2 * n", code.tests_of(json.dumps(many)), 60.0))
    slow = ["assert f(1) == 2", "assert sum(range(f(10**10))) > 0", "assert f(3) == 6"]
    found = code.passed("def f(n): return 2 * n", code.tests_of(json.dumps(slow)), 60.0)
    assert found[0] and not found[1]
