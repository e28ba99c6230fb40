"""Landlock: the kernel refuses this process files, TCP and signals beyond what is listed.

Needs no right; Linux 5.13 or newer (https://docs.kernel.org/userspace-api/landlock.html). Standard
library only: an isolated interpreter loads it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on x86-64 and on ARM
_PR_SET_NO_NEW_PRIVS = 38
_VERSION = 1  # flag of _CREATE_RULESET that asks for the ABI
_PATH_BENEATH = 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _READ_FILE | 1 << 1 | 1 << 14 | 1 << 15  # of what is no directory
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""ABI -> number of rights on files that it knows."""
_TCP_ABI, _TCP = 4, 0b11
_SIGNALS_ABI, _SIGNALS = 6, 0b11  # and abstract sockets


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """Version of the kernel's Landlock; 0 where it has none."""
    try:
        return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _VERSION)))
    except (AttributeError, OSError):
        return 0


def cuts_tcp() -> bool:
    """Whether `restrict` cuts TCP too."""
    return abi() >= _TCP_ABI


def restrict(*, readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Confine this process and its children: files below `readable` alone may be read and run,
    those below `writable` changed too; no TCP and no signal to others where the kernel can. Returns
    whether the kernel has Landlock; OSError where it refuses."""
    version = abi()
    if not version:
        return False
    rights = (1 << max(n for first, n in _FILE_RIGHTS.items() if first <= version)) - 1
    rules = _Ruleset(rights, 0, 0)
    size = 8
    if version >= _TCP_ABI:
        rules.net, size = _TCP, 16
    if version >= _SIGNALS_ABI:
        rules.scoped, size = _SIGNALS, 24
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0))
    for paths, allowed in ((readable, _READ), (writable, rights)):
        for path in paths:
            _allow(libc, ruleset, path, allowed & rights)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return True


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, allowed: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # it is not there: nothing to allow
    rule = _Beneath(allowed if os.path.isdir(path) else allowed & _OF_FILES, parent)
    _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0))
    os.close(parent)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
