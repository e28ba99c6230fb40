"""Giving up what root may do, in a user namespace or in earnest: it could take walls down.

`unshare --map-root-user` leaves every capability, and with those a program makes its read-only
mounts writable again. Standard library only: an isolated interpreter loads it.
"""

from __future__ import annotations

import ctypes
import os

_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_VERSION_3 = 0x20080522
_MOST = 64  # that the kernel's sets have room for


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_uint32) for n in ("effective", "permitted", "inheritable"))


def drop() -> None:
    """All of them, for this process and for what it starts; OSError if the kernel refuses. The last
    of what a process does to itself: it cannot mount or limit others any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(_MOST):  # those that the kernel does not know are refused
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = _Header(version=_VERSION_3), (_Set * 2)()
    if libc.capset(ctypes.byref(header), none) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
