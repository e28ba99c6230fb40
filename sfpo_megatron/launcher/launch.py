"""Starts the ranks of a run on this machine through torchrun's API, and ends all of them.

`sfpo-megatron train` outside torchrun comes here. torchrun's own report of a failure is a
traceback and a table; ours is one line that names the rank that failed first.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from sfpo_megatron.host import stopping
from sfpo_megatron.launcher.rank import error_file, log_dir

SHUTDOWN_TIMEOUT_S = 15  # above the worker's own limit (rank.CLOSING_TIME_S), below 30 s in all
LEFTOVER_GRACE_S = 3.0
_PR_SET_CHILD_SUBREAPER = 36
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# Exit codes of ranks that got our signal; Ray's own SIGTERM handler exits with the bare number.
_OURS = {code for n in (signal.SIGTERM, signal.SIGINT) for code in (-n, 128 + n)} | {signal.SIGTERM}

# How gloo, and our control group, say that another rank is gone.
# What a rank says that another one has made fail.
_LOST_PEER = (
    *("PeerLostError", "Connection closed by peer", "Connection reset by peer"),
    "another rank could not write its files",
)


def launch(
    arguments: list[str],
    *,
    num_ranks: int,
    output_dir: str,
    module: str = "sfpo_megatron",
    saves_when_stopped: bool = False,
) -> int:
    """Run `python -m MODULE ARGUMENTS` on `num_ranks` ranks; returns the exit code.

    `saves_when_stopped`: SIGTERM and SIGUSR1 ask the run to save and end; a second SIGTERM ends it.
    """
    # One OpenMP thread a process: two, beside any other busy process, ran 10x slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this launcher never leaves the machine
    if _HUGE_PAGES.exists():
        # torch then asks for huge pages from 2 MiB on. malloc gives such blocks back to the kernel
        # at each free, so that every embedding gradient is faulted in anew, 4 KiB at a time.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    stopping.forget(output_dir)
    signals = "SIGINT,SIGHUP,SIGQUIT"
    if saves_when_stopped:
        _ask_on_signal(output_dir)
    else:
        signals += ",SIGTERM"
    log_dir(output_dir).mkdir(parents=True, exist_ok=True)
    for old in log_dir(output_dir).glob("rank_*.err"):
        old.unlink()
    _adopt_orphans()
    try:
        return _run_agent([module, *arguments], num_ranks, output_dir, signals)
    except KeyboardInterrupt:  # before torchrun has put its handlers in place
        return 128 + signal.SIGINT
    finally:
        _end_descendants()


def _ask_on_signal(output_dir: str) -> None:
    stopping.request_on_signal(output_dir, signal.SIGTERM, signal.SIGUSR1)
    ask = signal.getsignal(signal.SIGTERM)
    assert callable(ask)

    def ask_once(signum: int, frame: FrameType | None) -> None:
        ask(signum, frame)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))

    signal.signal(signal.SIGTERM, ask_once)


def _run_agent(command: list[str], num_ranks: int, output_dir: str, signals: str) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from sfpo_megatron.launcher import rendezvous

    _quieten_torchrun()
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"sfpo-{os.getpid()}",
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint="",  # it binds a port that is free
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        signals_to_handle=signals,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", *command)
    except ChildFailedError as error:
        exit_codes = {rank: (f.exitcode, f.pid) for rank, f in error.failures.items()}
        line, exit_code = first_failure(exit_codes, output_dir)
        if exit_code != stopping.STOPPED_EXIT_CODE:  # rank 0 has said it
            print(line, file=sys.stderr, flush=True)
        return exit_code
    except SignalException as error:
        print(f"error: stopped by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT if error.sigval == signal.SIGINT else 1
    return 0


def first_failure(exit_codes: Mapping[int, tuple[int, int]], output_dir: str) -> tuple[str, int]:
    """The one line about a failed run, and the exit code of the launcher.

    `exit_codes`: rank -> (exit code, pid), in the order in which they were seen. A rank that was
    killed comes first, then those that raised by the time of their message; ranks that raised about
    a peer they lost come after that peer, whose own message may be later (rank 0 closes the
    engines before it says why), and ranks that this launcher ended itself come last.
    """

    def order(rank: int) -> tuple[float, float]:
        code = exit_codes[rank][0]
        if code == stopping.STOPPED_EXIT_CODE:
            return 1.5, 0.0  # after what failed by itself, before what lost it as a peer
        if code < 0 and code not in _OURS:
            return 0, 0.0
        file = error_file(output_dir, rank)
        if not file.exists():
            return (3, 0.0) if code in _OURS else (1, float("inf"))
        line = file.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
        lost_a_peer = any(sign in line for sign in _LOST_PEER)
        return 2 if lost_a_peer else 1, file.stat().st_mtime

    rank = min(exit_codes, key=order)
    code, pid = exit_codes[rank]
    if code == stopping.STOPPED_EXIT_CODE:
        return "stopped as asked", code
    who = f"error: rank {rank} (pid {pid})"
    file = error_file(output_dir, rank)
    # Our own signal may reach a rank that has raised and is on its way out.
    if not file.exists() if code in _OURS else code < 0:
        signum = signal.Signals(-code if code < 0 else code % 128)
        hint = "; the kernel does that when memory runs out" if signum == signal.SIGKILL else ""
        return f"{who} was killed by {signum.name}{hint}", 1
    if file.exists():
        line = file.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
        return line, 2 if code == 2 else 1
    return f"{who} ended with exit code {code} and no message", 1


def _quieten_torchrun() -> None:
    """Each of its loggers has a level of its own, so the parent's level does not reach them."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _adopt_orphans() -> None:
    """What a killed rank leaves behind (Ray, vLLM) becomes our child, so that we can end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants() -> None:
    for pid in descendants(os.getpid()):
        _send(pid, signal.SIGTERM)
    end = time.monotonic() + LEFTOVER_GRACE_S
    while (left := descendants(os.getpid())) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        _send(pid, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """Live processes below `root`, read from /proc (zombies are not alive)."""
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended while we were reading
            continue
        children.setdefault(int(parent), []).append(int(entry.parent.name))
        if state != "Z":
            alive.add(int(entry.parent.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += [pid for pid in below if pid in alive]
        todo += below
    return found


def _send(pid: int, signum: signal.Signals) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass
