"""Waiting for pipes, however many descriptors the process has: `select` ends at 1023."""

from __future__ import annotations

import math
import select
from collections.abc import Sequence


def ready(
    to_read: Sequence[int], to_write: Sequence[int], wait_s: float
) -> tuple[list[int], list[int]]:
    """The descriptors that can be read and written, or whose other end is closed; none after
    `wait_s`."""
    poll = select.poll()
    for descriptor in to_read:
        poll.register(descriptor, select.POLLIN)
    for descriptor in to_write:
        poll.register(descriptor, select.POLLOUT)
    found = dict(poll.poll(math.ceil(1000 * wait_s)))
    return [one for one in to_read if one in found], [one for one in to_write if one in found]
