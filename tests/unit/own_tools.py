"""Tools of a user's own, right and wrong, for the tests of tools."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator


def shout(text: str, *, times: int = 1) -> str:
    """Say it louder.

    Args:
        text: What to say.
        times: How often.
    """
    match text:
        case "hang":
            time.sleep(60)
        case "crash":
            os._exit(3)
        case "raise":
            raise LookupError("no such word")
        case "exit":
            sys.exit("gone")
        case "flood":
            while True:
                os.write(1, b"x" * 4096)
        case "memory":
            return str(len("x" * (1 << 33)))
        case "map":
            return str(len(mmap.mmap(-1, 1300 << 20)))
        case "long":
            return "y" * 300_000
        case "leave":
            return str(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)
    return text.upper() * times


def needs(text: str, *, file: str) -> str:
    """Look it up.

    Args:
        text: What.
        file: Where.
    """
    return text + file


def untyped(text):  # type: ignore[no-untyped-def]
    """Nothing is said of what it takes."""


def warm_up(*, times: int = 1, file: str = "") -> None:
    if times < 0:
        raise ValueError("times: found a negative number")


async def later(text: str) -> str:
    """Say it when it is time.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0.01)
    return f"later: {text}"


def yields(text: str) -> Iterator[str]:
    """Say it letter by letter.

    Args:
        text: What to say.
    """
    yield from text
