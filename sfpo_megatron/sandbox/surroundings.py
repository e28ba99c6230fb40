"""A limited process's own descriptors, streams and signals, and how a call finds them as before.

A reward function or a tool is anybody's code. What it does to its process during one call (a
closed stdout, another working directory, a handler, an alarm) must not decide what the next call
gives, nor reach the pipes that the run listens to.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TextIO


class Surroundings:
    """Moves the pipes of requests and results out of the way of descriptors 0 to 2 when it is made;
    `restore` puts back what a call has changed."""

    def __init__(self) -> None:
        self.requests, self.results = os.dup(0), os.dup(1)
        self._output = os.dup(2)
        self._nothing = os.open(os.devnull, os.O_RDONLY)
        self._pid = os.getpid()
        self._directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stdout, self._stderr = _stream(1), _stream(2)
        self.restore()

    def restore(self) -> None:
        """Put back working directory, output and the handlers of SIGINT and SIGIO; clear the alarm.
        An OSError (its descriptors were closed) ends the process."""
        if os.getpid() != self._pid:
            os._exit(1)  # a child that the function forked and let return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent decides
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        os.dup2(self._nothing, 0)  # input() ends at once, and takes no request
        for descriptor in (1, 2):
            os.dup2(self._output, descriptor)
        self._stdout = _usable(self._stdout, 1)
        self._stderr = _usable(self._stderr, 2)
        sys.stdout, sys.stderr = self._stdout, self._stderr
        os.fchdir(self._directory)


def _stream(descriptor: int) -> TextIO:
    """Text out whatever the locale: printing a lone surrogate is no error."""
    return open(
        descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )


def _usable(stream: TextIO, descriptor: int) -> TextIO:
    """The stream with nothing left in its buffer; another one if it was closed or detached."""
    try:
        stream.flush()
        return stream
    except ValueError:
        return _stream(descriptor)
