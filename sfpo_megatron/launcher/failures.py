"""How a rank failed, in a file of its own, and which of all ranks failed first. No torch."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from sfpo_megatron.host.peers import is_peers
from sfpo_megatron.host.phases import recorded_phase
from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.host.shortage import killed_by
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE

# Exit codes of ranks that got our signal; Ray's own SIGTERM handler exits with the bare number.
_OURS = {code for n in (signal.SIGTERM, signal.SIGINT) for code in (-n, 128 + n)} | {signal.SIGTERM}

WRONG_INPUT_EXIT_CODE = 2


@dataclass(kw_only=True, frozen=True, slots=True)
class Failure:
    """What made one rank fail."""

    kind: Literal["raised", "peer"]
    """`peer`: it only followed from another rank's failure."""
    time: float
    """Seconds since the epoch."""
    message: str
    """One line for the user."""
    exit_code: int
    """The rank's own, which our signal may replace while it is on its way out."""

    def write(self, directory: RunDirectory, rank: int) -> None:
        """Leave it for the launcher: whole, or not at all."""
        with replacing(directory.failure_file(rank)) as aside:
            aside.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def read(directory: RunDirectory, rank: int) -> Failure | None:
        """None for a rank that has left no message, or none that can be read."""
        try:
            found = json.loads(directory.failure_file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the file system may be what the run has ended of
            return None
        return Failure(**{field.name: found[field.name] for field in fields(Failure)})


def write_error_file(
    directory: RunDirectory, rank: int, error: BaseException, message: str, *, exit_code: int
) -> str:
    """Leave message and traceback in logs/rank_N.err, for a reader, and logs/rank_N.json, for the
    launcher; the line that names the file. Where they cannot be written, as on a full disk, the
    traceback goes to stderr: the rank's exit code must not become another."""
    file = directory.error_file(rank)
    line = f"{message} (traceback: {file})"
    kind: Literal["raised", "peer"] = "peer" if is_peers(error) else "raised"
    failure = Failure(kind=kind, time=time.time(), message=line, exit_code=exit_code)
    text = "".join(traceback.format_exception(error))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{line}\n\n{text}", encoding="utf-8")
        failure.write(directory, rank)
    except OSError:
        print(f"{text}{message}", file=sys.stderr, flush=True)
        return message
    return line


def first_failure(
    exit_codes: Mapping[int, tuple[int, int]], directory: RunDirectory
) -> tuple[str, int]:
    """The one line about a failed run, and the exit code of the launcher.

    `exit_codes`: rank -> (exit code, pid), in the order in which they were seen. A rank that was
    killed comes first, then those that raised by the time of their message; ranks that raised about
    a peer they lost come after that peer, whose own message may be later (rank 0 closes the
    engines before it says why), and ranks that this launcher ended itself come last.
    """

    def order(rank: int) -> tuple[float, float]:
        code, failure = exit_codes[rank][0], Failure.read(directory, rank)
        if code == STOPPED_EXIT_CODE:
            return 1.5, 0.0  # after what failed by itself, before what lost it as a peer
        if code < 0 and code not in _OURS:
            return 0, 0.0
        if failure is None:
            return (3, 0.0) if code in _OURS else (1, float("inf"))
        return 2 if failure.kind == "peer" else 1, failure.time

    rank = min(exit_codes, key=order)
    code, pid = exit_codes[rank]
    if code == STOPPED_EXIT_CODE:
        return "stopped as asked", code
    who, failure = f"error: rank {rank} (pid {pid})", Failure.read(directory, rank)
    # Our own signal may reach a rank that has raised and is on its way out.
    if failure is None if code in _OURS else code < 0:
        signum = -code if code < 0 else code % 128
        return f"{who} was {killed_by(signum, recorded_phase(directory.phase_file(rank)))}", 1
    if failure is not None:
        return failure.message, failure.exit_code
    # A message that could not be written changes nothing about what was given.
    kept = code if code == WRONG_INPUT_EXIT_CODE else 1
    return f"{who} ended with exit code {code} and no message", kept
