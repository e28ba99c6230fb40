"""Waiting for pipes, however many descriptors the process has: `select` ends at 1023."""

from __future__ import annotations

import math
import select
from collections.abc import Sequence

_LONGEST_MS = 2**31 - 1


def ready(
    to_read: Sequence[int], to_write: Sequence[int], wait_s: float
) -> tuple[list[int], list[int]]:
    """The descriptors that can be read and written, or whose other end is closed; none after
    `wait_s`, or after 24 days, which is the longest that the kernel waits."""
    poll = select.poll()
    for descriptor in to_read:
        poll.register(descriptor, select.POLLIN)
    for descriptor in to_write:
        poll.register(descriptor, select.POLLOUT)
    found = dict(poll.poll(min(math.ceil(1000 * wait_s), _LONGEST_MS)))
    return [one for one in to_read if one in found], [one for one in to_write if one in found]
