"""Whether this process is one of torchrun's ranks, by its environment. Standard library only.

Containers and job controllers set RANK or WORLD_SIZE by themselves, empty ones too: only all of
what torchrun sets, with numbers, says that there are other ranks.
"""

from __future__ import annotations

import os

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def num_ranks() -> int | None:
    """How many ranks torchrun has started; None if this process is none of them."""
    given = [os.environ.get(name, "") for name in _VARIABLES]
    if not all(text.isascii() and text.isdigit() for text in given):
        return None
    return int(os.environ["WORLD_SIZE"])


def speaks() -> bool:
    """Whether this process says what all ranks find alike."""
    return num_ranks() is None or int(os.environ["RANK"]) == 0
