"""One folder for all that a run keeps for its own time: sockets, Ray's session, temporary files.

Ray and vLLM bind sockets below TMPDIR, and the path of a socket has 107 bytes at most: a Slurm
job's TMPDIR may be too long for that, not be there, or be a file system without sockets. So a run
makes a folder of its own where sockets can be bound, which is TMPDIR where that will do, and
removes it at its end; nothing below has to tidy up. Standard library only.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sfpo_megatron.host.scratch import Scratch, remove_abandoned

PREFIX = "sfpo-"
LONGEST_SOCKET = 65
"""Bytes of the longest path of a socket below the folder: Ray's
session_YYYY-MM-DD_hh-mm-ss_microseconds_PID/sockets/plasma_store.1"""
_LONGEST_OF_ACTOR = 52  # vLLM's UUIDs, and multiprocessing's listeners below a scratch directory
_ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")
# Ray splits command lines at blanks, and ZeroMQ takes an address for text.
_PLAIN = re.compile(r"[A-Za-z0-9/._+=:@,-]*")


class NoTemporaryFolder(RuntimeError):
    """There is no folder for sockets: one line that says where it was looked for."""


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Have a folder for the temporary files of this process and all that it starts; NoTemporary-
    Folder without one. A forked child that leaves the context removes the folder as well."""
    scratch = short_folder()
    names = ("TMPDIR", "RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    usual = _usual()
    if usual is not None:  # what is worth keeping from run to run stays where it was
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_{_user()}")
    if "RAY_ADDRESS" not in os.environ:
        os.environ["RAY_TMPDIR"] = scratch.path
    elif usual is not None:  # Ray looks there for the cluster that `auto` means
        os.environ.setdefault("RAY_TMPDIR", usual)
    use(scratch.path)
    try:
        yield scratch.path
    finally:
        scratch.remove()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None


def use(folder: str) -> None:
    """Let temporary files of this process, and of what it starts, be made in `folder`."""
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = folder


def own_folder() -> Scratch:
    """A folder for an actor's temporary files, in use; its guard removes it."""
    scratch = short_folder(_LONGEST_OF_ACTOR)
    use(scratch.path)
    os.environ["VLLM_RPC_BASE_PATH"] = scratch.path
    return scratch


def short_folder(longest_socket: int = LONGEST_SOCKET) -> Scratch:
    """A new folder below which a socket with so long a name can be bound; NoTemporaryFolder."""
    tried: list[str] = []
    for parent in dict.fromkeys((*filter(None, [_usual()]), *_ELSEWHERE)):
        try:
            remove_abandoned(PREFIX, parent)
            scratch = Scratch(PREFIX, parent)
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        why = _no_socket(scratch.path, longest_socket)
        if why is None:
            return scratch
        tried.append(f"{parent}: {why}")
        scratch.remove()
    raise NoTemporaryFolder(
        f"TMPDIR: found no folder for sockets ({'; '.join(tried)}), expected one that can be "
        "written, with a path of at most 27 bytes; set TMPDIR to such a folder"
    )


def _usual() -> str | None:
    """The folder of temporary files without us; None if there is none."""
    with suppress(FileNotFoundError):
        return os.path.abspath(tempfile.gettempdir())
    return None


def _no_socket(folder: str, longest_socket: int) -> str | None:
    """Why a socket with such a long name cannot be bound in `folder`; None if it can."""
    if not _PLAIN.fullmatch(folder):
        return "blanks or other letters in the path"
    path = os.path.join(folder, "x" * longest_socket)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(path)
        except OSError as error:
            return error.strerror or str(error)
    os.unlink(path)
    return None


def _user() -> str:
    """A name for this user's files, also where the user has none."""
    with suppress(OSError, KeyError):
        return re.sub(r"[^A-Za-z0-9._-]", "_", getpass.getuser())
    return str(os.getuid())
