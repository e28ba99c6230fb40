"""How an engine's processes ended that wrote nothing to its log."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess

import pytest

from sfpo_megatron.rollout.root_cause import how_ended


def killed(signum: int) -> None:
    os.kill(os.getpid(), signum)


def child(target: object, *args: object) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)  # type: ignore[arg-type]
    process.start()
    return process


@pytest.mark.parametrize(
    ("signum", "expected"),
    [
        (signal.SIGKILL, "killed by SIGKILL; the kernel does that when memory runs out"),
        (signal.SIGILL, "killed by SIGILL, without a word"),
        (signal.SIGSEGV, "killed by SIGSEGV, without a word"),
    ],
)
def test_the_signal_is_named(signum: int, expected: str) -> None:
    """Memory is only guessed of the signal that the kernel sends for it."""
    process = child(killed, signum)
    process.join(20)
    assert how_ended([process]).startswith(expected)


def test_an_exit_code_and_one_that_lives() -> None:
    lives, gone = child(time.sleep, 60), child(os._exit, 3)
    try:
        gone.join(20)
        began = time.monotonic()
        assert how_ended([lives] * 30 + [gone]) == "exit code 3, without a word"
        assert time.monotonic() < began + 20  # not a second for each
        assert how_ended([lives]) == "without a word"
        assert how_ended([]) == "without a word"
    finally:
        lives.kill()
        lives.join()
