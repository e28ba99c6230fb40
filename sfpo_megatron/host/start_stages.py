"""What a process that starts is at, as lines in its log, for the process that waits for it.

Standard library only.
"""

from __future__ import annotations

import sys

_MARK = "sfpo-megatron: now "


def begin_stage(stage: str) -> None:
    """Say into this process's log what it begins, such as `loading weights`."""
    print(f"{_MARK}{stage}", file=sys.stderr, flush=True)


def stage_in(log: str) -> str:
    """The last one in a log; empty before the first."""
    _, mark, after = log.rpartition(_MARK)
    return after.partition("\n")[0] if mark else ""
