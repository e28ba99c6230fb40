"""What happens inside one rank around the run: signals, its error file, its exit code."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.host import stopping

CLOSING_TIME_S = 10.0
_PEERS_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


def log_dir(output_dir: str) -> Path:
    """Where the ranks of a run leave their error files."""
    return Path(output_dir).expanduser() / "logs"


def error_file(output_dir: str, rank: int) -> Path:
    """First line: the message of that rank; below it: the traceback."""
    return log_dir(output_dir) / f"rank_{rank}.err"


def run_rank(
    run: Callable[[], bool],
    *,
    output_dir: str,
    launched: bool,
    saves_when_stopped: bool = False,
) -> int:
    """Run one rank to its end and return its exit code. `run` returns True if it was asked to stop.

    `launched`: our launcher started it and prints the first failure of all ranks; under plain
    torchrun each rank prints its own. `saves_when_stopped`: SIGTERM and SIGUSR1 are requests.
    """
    rank = int(os.environ.get("RANK", "0"))
    if launched:
        _end_with_parent()
    elif rank == 0:
        stopping.forget(output_dir)
    install_signal_handlers(rank, asks=saves_when_stopped)
    if saves_when_stopped:
        stopping.request_on_signal(output_dir, signal.SIGTERM, signal.SIGUSR1)
    try:
        stopped = run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except stopping.StopRequested as reason:
        print(f"stopped by {reason} before the first train step", flush=True)
        return stopping.STOPPED_EXIT_CODE
    except Exception as error:
        line = f"error: {error}" if isinstance(error, ConfigError) else message_line(error, rank)
        file = error_file(output_dir, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        line = f"{line} (traceback: {file})"
        file.write_text(f"{line}\n\n{traceback.format_exc()}", encoding="utf-8")
        if not launched:
            print(line, file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    # One rank says so: torchrun ends the others as soon as one returns a code that is not 0.
    return stopping.STOPPED_EXIT_CODE if stopped and rank == 0 else 0


def record_exit_code(code: int, output_dir: str) -> int:
    """Leave this rank's exit code, unless it is 0, in logs/rank_N.exit for a job script: torchrun's
    own is 1 whatever its ranks say. Returns it."""
    if code:
        file = log_dir(output_dir) / f"rank_{os.environ.get('RANK', '0')}.exit"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{code}\n", encoding="utf-8")
    return code


def message_line(error: BaseException, rank: int) -> str:
    """`error: rank R: Type: message` on one line, whatever the message holds."""
    text = " ".join(str(error).split())
    limit = 600
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return f"error: rank {rank}: {type(error).__name__}: {text}"


def install_signal_handlers(rank: int, *, asks: bool = False) -> None:
    """Rank 0 owns Ray: SIGTERM and SIGINT unwind it, so that `finally` blocks close the engines.
    The other ranks own nothing outside themselves and die at once. `asks`: SIGTERM only asks to
    stop, unless another rank is gone: then it is torchrun's way of ending the rest."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _unwind if rank == 0 else signal.SIG_DFL)
    if rank == 0:
        _exit_if_unwinding_hangs(asks)


def _unwind(signum: int, frame: FrameType | None) -> None:
    for again in (signal.SIGTERM, signal.SIGINT):  # a second one must not cut the closing short
        signal.signal(again, signal.SIG_IGN)
    raise SystemExit(128 + signum)


def _exit_if_unwinding_hangs(asks: bool) -> None:
    """Python runs a handler between two bytecodes: never while the main thread waits in a gloo
    call for a rank that is gone. The wake-up fd is written by the C handler, so this thread hears
    of the signal anyway and ends the process when closing has had its time."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def end(signum: int) -> None:
        while asks and signum == signal.SIGTERM and stopping.lost_peer() is None:
            time.sleep(_PEERS_POLL_S)
        time.sleep(CLOSING_TIME_S)
        os._exit(128 + signum)

    def watch(keep_open: socket.socket = writer) -> None:
        while received := reader.recv(1):
            if received[0] in (signal.SIGTERM, signal.SIGINT):
                threading.Thread(target=end, args=(received[0],), daemon=True).start()

    threading.Thread(target=watch, name="exit-if-unwinding-hangs", daemon=True).start()


def _end_with_parent() -> None:
    """If the launcher itself is killed, the kernel ends this rank: SIGTERM would only ask it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
