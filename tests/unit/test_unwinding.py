"""What `except failures()` catches, and what goes through it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from sfpo_megatron.host.unwinding import Unwound, failures


def fail() -> None:
    raise ValueError("broken")


def leave() -> None:
    sys.exit(0)


def interrupted() -> None:
    raise KeyboardInterrupt


def signalled() -> None:
    raise Unwound(143)


def signalled_while_it_fails() -> None:
    try:
        fail()
    except ValueError:
        signalled()


def fails_after_a_signal() -> None:
    try:
        signalled()
    finally:
        fail()


def caught(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except failures() as error:
        return error
    return None


@pytest.mark.parametrize(
    ("work", "kind"),
    [(fail, ValueError), (leave, SystemExit), (fails_after_a_signal, ValueError)],
)
def test_failures_are_caught(work: Callable[[], None], kind: type[BaseException]) -> None:
    assert type(caught(work)) is kind


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (signalled, Unwound),
        (signalled_while_it_fails, Unwound),
        (interrupted, KeyboardInterrupt),
    ],
)
def test_what_ends_the_process_goes_through(
    work: Callable[[], None], kind: type[BaseException]
) -> None:
    """Also where the signal comes while another exception is handled."""
    with pytest.raises(kind):
        caught(work)


def test_a_signal_is_told_apart_inside_another_handler() -> None:
    """It is the exception at the clause that counts, not one that is handled around it."""
    try:
        signalled()
    except Unwound:
        assert type(caught(fail)) is ValueError
