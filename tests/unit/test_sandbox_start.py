"""Interpreters that start slowly: what counts is the time of the program."""

from __future__ import annotations

import json

import pytest

from sfpo_megatron.rewards import code
from sfpo_megatron.sandbox import interpreter
from sfpo_megatron.tools.python import python


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
    assert code.passed("def f(n): return 2 * n", code.tests_of(json.dumps(tests)), 0.5) == [
        True,
        True,
    ]


def test_an_interpreter_that_does_not_start_takes_no_longer_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interpreter, "command", lambda: ["sleep", "600"])
    monkeypatch.setattr(interpreter, "START_S", 0.3)
    assert "took longer than 60 s" in python("1", timeout_s=60.0)
