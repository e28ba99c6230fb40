"""Leaders and engine workers say in a store that they are there, before any enters a communicator.

NCCL makes a communicator in a call that blocks without limit while a peer has not come: torch's
`ProcessGroupNCCL::initNCCLComm`, at the first broadcast, calls `ncclCommInitRankConfig` with
`blocking = 1` unless told otherwise, and no watchdog looks at that call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

BROKEN = "broken"
"""Key that a leader sets where it could not send: nobody has to wait any longer."""
_ARRIVED = "arrived"
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.25


def members(leaders: Sequence[int], num_workers: int) -> list[str]:
    """Everybody who comes: the leaders by their ranks, the workers by their numbers."""
    leading = [f"trainer rank {rank}" for rank in leaders]
    return leading + [f"engine worker {number}" for number in range(num_workers)]


def roll_call(store: dist.Store, me: str, everybody: Sequence[str], timeout_s: float) -> None:
    """Say that `me` is here and wait for everybody; RuntimeError with the names of those who have
    not come within `timeout_s`, or where a leader has given up."""
    deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
    store.set(me, "here")
    num_here = store.add(_ARRIVED, 1)  # one small request a look, however many come
    while num_here < len(everybody):
        if store.check([BROKEN]):
            raise RuntimeError("a leader gave up while it waited for the others")
        if time.monotonic() > deadline:
            missing = [each for each in everybody if not store.check([each])]
            raise RuntimeError(
                f"{', '.join(missing)} of {len(everybody)} did not come within {timeout_s:g} s"
            )
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, _LONGEST_POLL_S)
        num_here = store.add(_ARRIVED, 0)
