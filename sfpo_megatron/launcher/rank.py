"""What happens inside one rank around the run: signals, its error file, its exit code."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import FrameType

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.errors import WrongInput, may_pass
from sfpo_megatron.host.peers import lost_peer
from sfpo_megatron.host.phases import phase_of, record_phases
from sfpo_megatron.host.processes import end_with_parent
from sfpo_megatron.host.shortage import MemoryShortage
from sfpo_megatron.host.temporary import NoTemporaryFolder, temporary_folder
from sfpo_megatron.host.unwinding import Unwound, failures
from sfpo_megatron.launcher.failures import WRONG_INPUT_EXIT_CODE, write_error_file
from sfpo_megatron.outputs import lock, stopping
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import DirectoryRefused

CLOSING_TIME_S = 10.0
_PEERS_POLL_S = 0.5
_UNWINDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_rank(
    run: Callable[[], bool],
    *,
    directory: RunDirectory,
    launched: bool,
    saves_when_stopped: bool = False,
) -> int:
    """Run one rank to its end and return its exit code. `run` returns True if it was asked to stop.

    Rank 0 holds the run's directory meanwhile; where another run has it nothing is written.
    `launched`: our launcher started it and prints the first failure of all ranks; under plain
    torchrun each rank prints its own. `saves_when_stopped`: SIGTERM and SIGUSR1 are requests.
    """
    rank = int(os.environ.get("RANK", "0"))
    if launched:  # if the launcher itself is killed; SIGTERM would only ask
        end_with_parent(signal.SIGINT)
        record_phases(directory.phase_file(rank))
    install_signal_handlers(rank, asks=saves_when_stopped)
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    name = launched_name(run_id) if launched else torchrun_name()

    def is_ours() -> bool:
        return not lock.is_anothers(directory, name)

    try:
        with ExitStack() as held:
            if rank == 0:
                held.enter_context(lock.RunLock(directory, run=name))
            if rank == 0 and not launched:  # else the launcher has done it
                held.enter_context(temporary_folder())
                stopping.forget(directory)
                directory.forget_ranks()
            if saves_when_stopped:
                stopping.request_on_signal(
                    directory, signal.SIGTERM, signal.SIGUSR1, is_ours=is_ours
                )
            code, error = _run(run, rank, directory, launched=launched, is_ours=is_ours)
            if launched:  # whoever was killed has left it
                with suppress(OSError):
                    directory.phase_file(rank).unlink(missing_ok=True)
            if code and is_ours():
                final = isinstance(error, stopping.RunEnded)
                _record_exit_code(code, rank, directory, final=final)
            return code
    except (DirectoryRefused, NoTemporaryFolder) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if rank == 0:  # nothing is left to unwind: Python's own clean-up would print a traceback
            _let_pass()


def _run(
    run: Callable[[], bool],
    rank: int,
    directory: RunDirectory,
    *,
    launched: bool,
    is_ours: Callable[[], bool],
) -> tuple[int, BaseException | None]:
    """The exit code, and what the run ended with."""
    try:
        stopped = run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, None
    except stopping.StopRequested as reason:
        print(f"stopped by {reason} before the first train step", flush=True)
        return stopping.STOPPED_EXIT_CODE, None
    except failures() as error:
        is_config = isinstance(error, ConfigError)
        line = f"error: {error}" if is_config else message_line(error, rank)
        code = exit_code_of(error)
        if is_ours():
            line = write_error_file(directory, rank, error, line, exit_code=code)
        else:  # rank 0 has not got the directory, or not yet
            traceback.print_exc()
        if not launched:
            print(line, file=sys.stderr, flush=True)
        return code, error
    # One rank says so: torchrun ends the others as soon as one returns a code that is not 0.
    return (stopping.STOPPED_EXIT_CODE if stopped and rank == 0 else 0), None


def exit_code_of(error: BaseException) -> int:
    """Exit code of a command which this ended: whether another start could succeed. A hub or a
    file system that is away may be back by then."""
    return WRONG_INPUT_EXIT_CODE if isinstance(error, WrongInput) and not may_pass(error) else 1


def torchrun_id(launcher: int) -> str:
    """Run id that our launcher with that pid gives to torchrun."""
    return f"sfpo-{launcher}"


def launched_name(run_id: str) -> str:
    """A name that all processes of a run have which our launcher started, and no other run."""
    return f"{run_id} {socket.gethostname()}"


def torchrun_name(environ: Mapping[str, str] = os.environ) -> str:
    """The same for ranks of a plain torchrun. Users' run ids need not differ (the default is
    `none`), the port where a run's ranks meet does."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    parts = [environ.get(name, "") for name in names]
    if environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE"):  # an address may be loopback
        parts.append(socket.gethostname())
    return " ".join(parts)


def _record_exit_code(code: int, rank: int, directory: RunDirectory, *, final: bool) -> None:
    """Leave it in logs/rank_N.exit for a job script: torchrun's own is 1 whatever its ranks say.
    `final`: a line more says that the job is not to be requeued."""
    file = directory.exit_file(rank)
    with suppress(OSError):  # a disk that is full may be what the run has ended of
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{code}\nfinal\n" if final else f"{code}\n", encoding="utf-8")


def message_line(error: BaseException, rank: int) -> str:
    """`error: rank R: Type: message` on one line, whatever the message holds; of a long one the two
    ends: what was found stands first, what to do last."""
    if (shortage := MemoryShortage.of(error)) is not None:
        return f"error: rank {rank}: {shortage.line(phase_of(error))}"
    text = " ".join(str(error).split())
    first, last = 600, 220
    text = text if len(text) <= first + last else f"{text[:first]} ... {text[-last:]}"
    return f"error: rank {rank}: {type(error).__name__}: {text}"


def install_signal_handlers(rank: int, *, asks: bool = False) -> None:
    """Rank 0 owns Ray: signals unwind it, so that `finally` blocks close the engines. The other
    ranks own nothing outside themselves and die at once. `asks`: SIGTERM and SIGUSR1 only ask to
    stop, unless another rank is gone: then SIGTERM is torchrun's way of ending the rest."""
    for signum in _UNWINDING:
        signal.signal(signum, _unwind if rank == 0 else signal.SIG_DFL)
    if rank == 0:
        _exit_if_unwinding_hangs(asks)


def _unwind(signum: int, frame: FrameType | None) -> None:
    _let_pass()  # a second one must not cut the closing short
    # The first one is heard of already: later ones begin no second watch of the closing.
    signal.set_wakeup_fd(-1)
    raise Unwound(128 + signum)


def _let_pass() -> None:
    for signum in _UNWINDING:
        signal.signal(signum, _under_way)


def _under_way(signum: int, frame: FrameType | None) -> None:
    """Not SIG_IGN: Python prints a traceback of a signal that has come and not been handled when
    that is set, as where Ctrl-C and the launcher's SIGTERM come together."""


def _exit_if_unwinding_hangs(asks: bool) -> None:
    """Python runs a handler between two bytecodes: never while the main thread waits in a gloo
    call for a rank that is gone. The wake-up fd is written by the C handler, so this thread hears
    of the signal anyway and ends the process when closing has had its time."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def end(signum: int) -> None:
        while asks and signum == signal.SIGTERM and lost_peer() is None:
            time.sleep(_PEERS_POLL_S)
        time.sleep(CLOSING_TIME_S)
        os._exit(128 + signum)

    def watch(keep_open: socket.socket = writer) -> None:
        while received := reader.recv(1):
            if received[0] in _UNWINDING and not (asks and received[0] == signal.SIGUSR1):
                threading.Thread(target=end, args=(received[0],), daemon=True).start()

    threading.Thread(target=watch, name="exit-if-unwinding-hangs", daemon=True).start()
