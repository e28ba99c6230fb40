"""How far from the run this machine lets a program be: by namespaces, by Landlock for files, and by
seccomp for sockets."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sfpo_megatron.sandbox import landlock, mounts, sockets

_OWN_PROCESSES = ("--pid", "--fork", "--kill-child")
_BASES = (
    ("--user", "--map-root-user", "--net", *_OWN_PROCESSES),
    ("--net", *_OWN_PROCESSES),  # as root where user namespaces are off
    ("--user", "--map-root-user", "--net"),
)
_WAYS = tuple((*base, *more) for base in _BASES for more in (("--ipc", "--mount"), ("--ipc",), ()))
_TRIAL_S = 10.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Isolation:
    """What can be had here."""

    command: tuple[str, ...]
    """What a command is put behind; empty where nothing can be unshared."""
    files: bool
    """Files outside of a list cannot be read or written."""
    tcp: bool
    """TCP is cut without namespaces too."""
    sockets: bool = False
    """Unix sockets of others cannot be had."""

    @property
    def network(self) -> bool:
        return "--net" in self.command

    @property
    def processes(self) -> bool:
        return "--pid" in self.command

    @property
    def mounts(self) -> bool:
        """It has mounts of its own (`mounts.py`)."""
        return "--mount" in self.command

    @property
    def limits_processes(self) -> Literal["rlimit", "pid_max", "no"]:
        """How the number of processes is limited for one program alone: a user's own in its
        namespace, but not root's, whom the kernel lets pass; else by the namespace's pid_max, which
        before Linux 6.14 is the whole machine's."""
        if "--user" in self.command and os.geteuid() != 0:
            return "rlimit"
        return "pid_max" if self.processes and _kernel() >= (6, 14) else "no"

    @property
    def missing(self) -> list[str]:
        """What a program is not kept from, in words."""
        gaps = []
        if not self.network:
            gaps.append("the network but for TCP" if self.tcp else "the network")
        if not self.files:
            gaps.append("files of this user")
        if not self.mounts:
            gaps.append("modes and times of this user's files, and filling the disk")
        if not self.sockets:
            gaps.append("Unix sockets of this user")
        if "--ipc" not in self.command:
            gaps.append("shared memory that outlives it")
        if not self.processes:
            gaps.append("the list of processes")
        if self.limits_processes == "no":
            gaps.append("starting any number of processes")
        return gaps


@lru_cache(maxsize=1)
def isolation() -> Isolation:
    """Tried out once a process."""
    return Isolation(
        command=next((way for way in map(_command, _WAYS) if _works(way)), ()),
        files=landlock.abi() > 0,
        tcp=landlock.cuts_tcp(),
        sockets=sockets.can_refuse(),
    )


def _kernel() -> tuple[int, ...]:
    """Linux's version: which pid_max is whose cannot be tried out without harm."""
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _command(way: tuple[str, ...]) -> tuple[str, ...]:
    return (shutil.which("unshare") or "unshare", *way)


def _works(command: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tried = ["true"]
        if "--mount" in command:
            outer = str(mounts.namespace())
            tried = [sys.executable, "-I", str(mounts.__file__), folder, outer]
        try:
            done = subprocess.run([*command, *tried], capture_output=True, timeout=_TRIAL_S)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0
