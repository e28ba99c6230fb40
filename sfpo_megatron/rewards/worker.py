"""The scoring process: reads batches on stdin, writes one line for each response it has scored.

Started by `pool.py` as `python -m sfpo_megatron.rewards.worker MODULE LIFELINE_FD`. Both
directions are lines of JSON (nothing a response says can be executed, as pickle could):

    in   {"problems": [{id, question, answer, metadata}...], "items": [[problem, response]...]}
    out  {"ready": true}, then for each item [reward] or {"error": traceback}

An exception is told apart by what raises it. If the verifier also raises on the prompt's own
reference answer, prompt or verifier is broken: reported, and the run ends. If only the response
makes it raise (or run out of memory), the response is a wrong answer: 0.

The process limits itself: no core dump, no file written, low priority, memory; and it cannot
outlive its parent, not even in a loop that never returns to Python: the kernel signals it when
the other end of LIFELINE closes.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from sfpo_megatron.rewards import Verifier, load_verifier

EXTRA_MEMORY_BYTES = 1 << 30
"""Address space that scoring may take beyond what the process has once it is ready."""


@dataclass(kw_only=True, frozen=True, slots=True)
class WireProblem:
    """`rewards.Problem` as it came over the pipe."""

    id: str
    question: str
    answer: str
    metadata: Mapping[str, Any]


def main(verifier_module: str, lifeline_fd: int) -> None:
    """Serve until stdin ends."""
    die_with(lifeline_fd)
    # What a verifier prints must not get between the results: results have a descriptor of their
    # own, and fd 1 is stderr from here on.
    results = os.dup(1)
    os.dup2(2, 1)
    score = load_verifier(verifier_module)
    limit_this_process()
    _write(results, {"ready": True})
    serve(score, sys.stdin.buffer, results)


def serve(score: Verifier, requests: BinaryIO, results: int) -> None:
    """Score batch after batch; a line for each item as soon as it is scored, because the parent
    takes the time between lines for the time of an item."""
    for line in requests:
        batch = json.loads(line)
        problems = [WireProblem(**fields) for fields in batch["problems"]]
        _allow_cpu_seconds(batch["cpu_s"])
        for index, response in batch["items"]:
            _write(results, score_one(score, response, problems[index]))


def score_one(score: Verifier, response: str, problem: WireProblem) -> list[float] | dict[str, str]:
    """[reward], or {"error": ...} if the verifier cannot score the reference answer either."""
    try:
        return [score(response, problem)]
    except Exception:
        raised = traceback.format_exc(limit=8)
    try:
        score(problem.answer, problem)
    except Exception:
        return {"error": raised}
    return [0.0]


def die_with(lifeline_fd: int) -> None:
    """SIGIO, whose default action ends the process, when the parent's end of the pipe closes.

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the process ends, and pools
    are made in threads of Ray actors. Not a thread that reads the pipe: a verifier that holds the
    interpreter lock would stop it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent decides
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:  # it closed before it was watched
        sys.exit(0)


def limit_this_process() -> None:
    """After the imports, so that the memory limit is counted from what they need."""
    os.nice(5)
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, in_use + EXTRA_MEMORY_BYTES),
    ):
        resource.setrlimit(what, (limit, limit))


def _allow_cpu_seconds(seconds: float) -> None:
    """The kernel's own time limit, for a parent that is stopped and cannot enforce its own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _write(results: int, value: object) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(results, data) :]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
