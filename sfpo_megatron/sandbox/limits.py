"""What a limited process does to itself: it ends with its parent, and takes no more than it may.

It cannot outlive its parent, not even in a loop that never returns to Python or is deaf to signals:
the kernel kills it when the other end of its lifeline closes.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping

from sfpo_megatron.errors import may_pass
from sfpo_megatron.host.processes import end_with_parent
from sfpo_megatron.plugins import PluginError
from sfpo_megatron.sandbox.waiting import ready

EXTRA_MEMORY_BYTES = 1 << 30
"""Address space that a call may take beyond what the process has once it is ready."""
FILE_BYTES = 64 << 20
"""How large a file a user's own function may write."""
_F_SETSIG = 10  # <fcntl.h>; Python has no name for it


def die_with(lifeline_fd: int) -> None:
    """SIGKILL, which nothing can ignore or block, to this process and to those that it has started,
    when the parent's end of the pipe closes; to this one also when the function has closed its own
    end or has left the group.

    Not a thread that reads the pipe: a verifier that holds the interpreter lock would stop it.
    """
    end_with_parent(signal.SIGKILL)  # with the thread that started it: one of the pool's
    fcntl.fcntl(lifeline_fd, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())  # a group of its own (process.py)
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    if ready([lifeline_fd], [], 0)[0]:  # it closed before it was watched
        sys.exit(0)


def limit_this_process(*, file_bytes: int, programs_bytes: int = 0) -> None:
    """After the imports, so that the memory limit is counted from what they need.
    `programs_bytes`: memory of each program that it starts, which sets that limit for itself: the
    kernel lets it set none above this process's hard one."""
    os.nice(5)
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    own_bytes = in_use + EXTRA_MEMORY_BYTES
    for what, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_AS, own_bytes, max(own_bytes, programs_bytes)),
    ):
        resource.setrlimit(what, (soft, hard))


def allow_cpu_seconds(seconds: float) -> None:
    """The kernel's own time limit, for a parent that is stopped and cannot enforce its own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def say_failed(results: int, error: BaseException, name: str) -> None:
    """Tell the parent why the process cannot serve, and the log with a traceback. `name`: what has
    raised, if it was not refused by `plugins`."""
    traceback.print_exception(error)
    raised = f"{name} raised {type(error).__name__}: {error}"
    reason = str(error) if isinstance(error, PluginError) else raised
    write_line(results, {"failed": reason, "may_pass": may_pass(error)})


def write_line(descriptor: int, reply: Mapping[str, object]) -> None:
    """One line of JSON, whole."""
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]
