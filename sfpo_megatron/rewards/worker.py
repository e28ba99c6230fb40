"""The scoring process: reads batches on stdin, writes a line for each response it has scored.

Started by `process.py` as
`python -m sfpo_megatron.rewards.worker LIFELINE_FD THINKING FUNCTIONS`, whose last is JSON:
[[name, whether it takes lists], ...]. `wire.py` says what the lines are, `judge.py` makes the
verdicts.

The process limits itself: no core dump, memory, low priority, and files of at most 64 MiB, or none
at all for what is built in; and it cannot outlive its parent, not even in a loop that never returns
to Python or is deaf to signals: the kernel kills it when the other end of LIFELINE closes.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

from sfpo_megatron.host.processes import end_with_parent
from sfpo_megatron.plugins import BATCHED_REWARD, REWARD, Foreign, PluginError
from sfpo_megatron.rewards.judge import Judge
from sfpo_megatron.rewards.surroundings import Surroundings
from sfpo_megatron.rewards.wire import Batch, Reply, Verdict, WireProblem, unpacked

EXTRA_MEMORY_BYTES = 1 << 30
"""Address space that scoring may take beyond what the process has once it is ready."""
FILE_BYTES = 64 << 20
"""How large a file a user's own function may write."""
_F_SETSIG = 10  # <fcntl.h>; Python has no name for it


def main(lifeline_fd: int, thinking: str, functions: list[tuple[str, bool]]) -> None:
    """Serve until the requests end."""
    die_with(lifeline_fd)
    surroundings = Surroundings()
    faulthandler.enable()  # where native code crashed, into the log
    judges: list[Judge] = []
    for name, batched in functions:
        try:
            judges.append(load_judge(name, batched, thinking, surroundings))
        except (
            BaseException
        ) as error:  # SystemExit too: a module may call sys.exit while it is imported
            traceback.print_exc()
            is_ours = isinstance(error, PluginError)
            reason = str(error) if is_ours else f"{name} raised {type(error).__name__}: {error}"
            _write(surroundings.results, {"failed": reason})
            return
    surroundings.restore()
    is_built_in = all(name in REWARD.built_in for name, _ in functions)
    limit_this_process(file_bytes=0 if is_built_in else FILE_BYTES)
    _write(surroundings.results, {"ready": True})
    with open(surroundings.requests, "rb") as requests:
        # A user's own function may have threads: the seconds of a response are each core's then.
        num_cores = 1 if is_built_in else len(os.sched_getaffinity(0))
        serve(judges, requests, surroundings.results, num_cores=num_cores)


def load_judge(name: str, batched: bool, thinking: str, surroundings: Surroundings) -> Judge:
    """The reward function, after the `warm_up()` of its module if it has one (slow imports). One
    that is built in looks at a response as `reward.thinking` says; your own gets all of it."""
    kind = BATCHED_REWARD if batched else REWARD
    function: Callable[..., Foreign] = kind.load(name)
    module = sys.modules[kind.built_in.get(name, name).partition(":")[0]]
    warm_up = getattr(module, "warm_up", None)
    if callable(warm_up):
        warm_up()
    if name not in kind.built_in:
        return Judge(function, batched=batched, surroundings=surroundings)
    return Judge(
        partial(function, thinking=thinking),
        batched=False,
        surroundings=surroundings,
        explain=partial(module.explain, thinking=thinking),
    )


def serve(judges: list[Judge], requests: BinaryIO, results: int, *, num_cores: int) -> None:
    """Score batch after batch; one by one there is a line for each response as soon as it is
    scored, because the parent takes the time between lines for the time of a response."""
    for line in requests:
        batch: Batch = unpacked(line)
        judge = judges[batch["function"]]
        problems = [WireProblem(**fields) for fields in batch["problems"]]
        _allow_cpu_seconds(batch["cpu_s"] * num_cores)
        items = [(response, problems[index]) for index, response in batch["items"]]
        if judge.batched:
            responses, theirs = zip(*items, strict=True)
            _write(results, judge.verdicts(responses, theirs))
            continue
        for response, problem in items:
            verdict = judge.verdict(response, problem)
            if batch["explain"]:
                verdict |= judge.explained(response, problem)
            _write(results, verdict)


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
    if select.select([lifeline_fd], [], [], 0)[0]:  # it closed before it was watched
        sys.exit(0)


def limit_this_process(*, file_bytes: int) -> None:
    """After the imports, so that the memory limit is counted from what they need."""
    os.nice(5)
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, in_use + EXTRA_MEMORY_BYTES),
    ):
        resource.setrlimit(what, (limit, limit))


def _allow_cpu_seconds(seconds: float) -> None:
    """The kernel's own time limit, for a parent that is stopped and cannot enforce its own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _write(results: int, reply: Reply | Verdict) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(results, data) :]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
