"""The tool process: reads calls on stdin, and writes a line with what each gave.

Started by `pool.py` as `python -m sfpo_megatron.tools.runner LIFELINE_FD TIMEOUT_S TOOLS`, whose
last is JSON: [[name, settings], ...]. It limits itself as a scoring process does.

in   {"tool": INDEX, "arguments": {...}, "cpu_s": SECONDS}
out  {"ready": true} or {"failed": reason} once, then {"result": text} or {"error": text} for a
     call, the latter with {"not_begun": true} where the machine began no program
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import TypedDict

from sfpo_megatron.host.processes import adopt_orphans, descendants, send_signal
from sfpo_megatron.sandbox.limits import (
    FILE_BYTES,
    allow_cpu_seconds,
    die_with,
    limit_this_process,
    say_failed,
    write_line,
)
from sfpo_megatron.sandbox.surroundings import Surroundings
from sfpo_megatron.tools import NotBegun, ToolError
from sfpo_megatron.tools.declared import BoundTool, ToolChoice
from sfpo_megatron.types import Json

_MAX_RESULT_CHARS = 100_000  # of a line to the parent, which cuts it to what the model may read


class ToolCallRequest(TypedDict):
    """A line to the process."""

    tool: int
    arguments: dict[str, Json]
    cpu_s: float


class ToolReply(TypedDict, total=False):
    """A line from the process."""

    ready: bool
    failed: str
    may_pass: bool
    """Whether another start could load what failed."""
    result: str
    error: str
    """Why there is none, for the model."""
    not_begun: bool
    """Whether that is `NotBegun`."""


def main(lifeline_fd: int, timeout_s: float, choices: list[ToolChoice]) -> None:
    """Serve until the calls end."""
    die_with(lifeline_fd)
    surroundings = Surroundings()
    faulthandler.enable()
    adopt_orphans()
    tools: list[BoundTool] = []
    for choice in choices:
        try:
            tool = choice.load(timeout_s=timeout_s)
            tool.warm_up()
        except BaseException as error:  # SystemExit too: a module may call it while it is imported
            say_failed(surroundings.results, error, f"tool {choice.name}")
            return
        tools.append(tool)
    surroundings.restore()
    programs_bytes = max((choice.programs_bytes for choice in choices), default=0)
    limit_this_process(file_bytes=FILE_BYTES, programs_bytes=programs_bytes)
    write_line(surroundings.results, {"ready": True})
    with open(surroundings.requests, "rb") as requests:
        for line in requests:
            call: ToolCallRequest = json.loads(line)
            allow_cpu_seconds(call["cpu_s"] * len(os.sched_getaffinity(0)))
            reply = answer(tools[call["tool"]], call["arguments"])
            surroundings.restore()
            _end_what_it_started()
            write_line(surroundings.results, reply)


def answer(tool: BoundTool, arguments: Mapping[str, Json]) -> ToolReply:
    """What one call gives; an exception is an error that the model is told."""
    try:
        return {"result": tool.call(arguments)[:_MAX_RESULT_CHARS]}
    except NotBegun as error:
        return {"error": str(error), "not_begun": True}
    except ToolError as error:
        return {"error": str(error)}
    except BaseException as error:
        traceback.print_exc(limit=8)
        return {"error": f"{type(error).__name__}: {error}"[:_MAX_RESULT_CHARS]}


def _end_what_it_started() -> None:
    for pid in descendants(os.getpid()):
        send_signal(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        float(sys.argv[2]),
        [ToolChoice(name=name, settings=settings) for name, settings in json.loads(sys.argv[3])],
    )
