"""Starts the ranks of a run on this machine through torchrun's API, and ends all of them.

`sfpo-megatron train` outside torchrun comes here. torchrun's own report of a failure is a
traceback and a table; ours is one line that names the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path

from sfpo_megatron.host.addresses import leaves_machine
from sfpo_megatron.host.terminal import announce, give_back
from sfpo_megatron.host.variables import When, settle
from sfpo_megatron.launcher.failures import first_failure
from sfpo_megatron.launcher.rank import launched_name, torchrun_id
from sfpo_megatron.launcher.supervise import supervise
from sfpo_megatron.outputs import stopping
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import DirectoryRefused
from sfpo_megatron.outputs.lock import RunLock

SHUTDOWN_TIMEOUT_S = 15  # above the rank's own limit (rank.CLOSING_TIME_S), below 30 s in all
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def launch(
    arguments: list[str],
    *,
    num_ranks: int,
    directory: RunDirectory,
    is_live: bool = False,
    module: str = "sfpo_megatron",
    saves_when_stopped: bool = False,
) -> int:
    """Run `python -m MODULE ARGUMENTS` on `num_ranks` ranks; returns the exit code.

    `is_live`: rank 0 may redraw a line of the terminal. `saves_when_stopped`: SIGTERM and SIGUSR1
    ask the run to save and end; a second SIGTERM ends it.
    Where another run has the directory nothing is started or written: 1, not 2, since a later
    start may succeed.
    """
    facts: list[When] = [] if leaves_machine() else ["one machine"]
    if _HUGE_PAGES.exists():
        facts.append("huge pages")
    settle("launcher", *facts)
    run_id = torchrun_id(os.getpid())

    command = [module, *arguments]
    try:
        with RunLock(directory, run=launched_name(run_id)):
            stopping.forget(directory)
            directory.forget_ranks()
            return supervise(
                lambda: _run(command, num_ranks, directory, run_id, is_live=is_live),
                ask=partial(stopping.request, directory) if saves_when_stopped else None,
            )
    except DirectoryRefused as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _run(
    command: list[str], num_ranks: int, directory: RunDirectory, run_id: str, *, is_live: bool
) -> int:
    """Run the ranks to their end and say how they failed; the exit code."""
    if is_live:
        announce("starting the trainer's ranks", sys.stdout)
    try:
        code, line = _run_agent(command, num_ranks, directory, run_id)
    finally:
        if is_live:  # a rank that is killed leaves the terminal as it is
            give_back(sys.stdout)
    if line is not None:
        print(line, file=sys.stderr, flush=True)
    return code


def _run_agent(
    command: list[str], num_ranks: int, directory: RunDirectory, run_id: str
) -> tuple[int, str | None]:
    """The exit code, and what is to be said of a failure."""
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
        run_id=run_id,
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint="",  # it binds a port that is free
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        signals_to_handle="SIGINT",  # all that the process in front sends to end a run
    )
    try:
        # torchrun takes arguments for templates: it replaces $local_rank, and $$ by a dollar.
        escaped = [argument.replace("$", "$$") for argument in command]
        elastic_launch(config, sys.executable)("-u", "-m", *escaped)
    except ChildFailedError as error:
        exit_codes = {rank: (f.exitcode, f.pid) for rank, f in error.failures.items()}
        line, exit_code = first_failure(exit_codes, directory)
        is_said = exit_code == stopping.STOPPED_EXIT_CODE  # by rank 0
        return exit_code, None if is_said else line
    except SignalException as error:
        return 128 + error.sigval, None
    return 0, None


def _quieten_torchrun() -> None:
    """Each of its loggers has a level of its own, so the parent's level does not reach them."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
