"""The scoring process: reads batches on stdin, writes a line for each response it has scored.

Started by `process.py` as
`python -m sfpo_megatron.rewards.worker LIFELINE_FD THINKING TIMEOUT_S FUNCTIONS`, whose last is
JSON: [[name, whether it takes lists], ...]. `wire.py` says what the lines are, `judge.py` makes the
verdicts.

The process limits itself (`sandbox/limits.py`): no core dump, memory, low priority, and files of at
most 64 MiB, or none at all for what is built in; and it ends when the other end of LIFELINE closes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

from sfpo_megatron.plugins import BATCHED_REWARD, REWARD, Foreign
from sfpo_megatron.rewards.judge import Judge
from sfpo_megatron.rewards.process import KEEPS_THE_LIMIT
from sfpo_megatron.rewards.wire import Batch, WireProblem, unpacked
from sfpo_megatron.sandbox.limits import (
    FILE_BYTES,
    allow_cpu_seconds,
    die_with,
    limit_this_process,
    say_failed,
    write_line,
)
from sfpo_megatron.sandbox.surroundings import Surroundings


def main(
    lifeline_fd: int, thinking: str, timeout_s: float, functions: list[tuple[str, bool]]
) -> None:
    """Serve until the requests end."""
    die_with(lifeline_fd)
    surroundings = Surroundings()
    faulthandler.enable()  # where native code crashed, into the log
    judges: list[Judge] = []
    for name, batched in functions:
        try:
            judges.append(load_judge(name, batched, thinking, timeout_s, surroundings))
        except (
            BaseException
        ) as error:  # SystemExit too: a module may call sys.exit while it is imported
            say_failed(surroundings.results, error, f"reward.function: {name}")
            return
    surroundings.restore()
    is_built_in = all(name in REWARD.built_in for name, _ in functions)
    runs_programs = any(name in KEEPS_THE_LIMIT for name, _ in functions)
    limit_this_process(file_bytes=0 if is_built_in and not runs_programs else FILE_BYTES)
    write_line(surroundings.results, {"ready": True})
    with open(surroundings.requests, "rb") as requests:
        # A user's own function may have threads: the seconds of a response are each core's then.
        num_cores = 1 if is_built_in else len(os.sched_getaffinity(0))
        serve(judges, requests, surroundings.results, num_cores=num_cores)


def load_judge(
    name: str, batched: bool, thinking: str, timeout_s: float, surroundings: Surroundings
) -> Judge:
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
    settings: dict[str, str | float] = {"thinking": thinking}
    if name in KEEPS_THE_LIMIT:
        settings["timeout_s"] = timeout_s
    return Judge(
        partial(function, **settings),
        batched=False,
        surroundings=surroundings,
        explain=partial(module.explain, **settings),
    )


def serve(judges: list[Judge], requests: BinaryIO, results: int, *, num_cores: int) -> None:
    """Score batch after batch; one by one there is a line for each response as soon as it is
    scored, because the parent takes the time between lines for the time of a response."""
    for line in requests:
        batch: Batch = unpacked(line)
        judge = judges[batch["function"]]
        problems = [WireProblem(**fields) for fields in batch["problems"]]
        allow_cpu_seconds(batch["cpu_s"] * num_cores)
        items = [(response, problems[index]) for index, response in batch["items"]]
        if judge.batched:
            responses, theirs = zip(*items, strict=True)
            write_line(results, judge.verdicts(responses, theirs))
            continue
        for response, problem in items:
            verdict = judge.verdict(response, problem)
            if batch["explain"]:
                verdict |= judge.explained(response, problem)
            write_line(results, verdict)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), json.loads(sys.argv[4]))
