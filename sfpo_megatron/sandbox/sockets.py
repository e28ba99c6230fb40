"""No socket that is in no network namespace: seccomp refuses this process and its children those.

A Unix socket with a path is in none, and Landlock lets everyone connect to it: Ray's, an ssh
agent's; nor is one to the host of a virtual machine. So only sockets of the internet and of netlink
are made. A stream pair, which asyncio has, cannot be connected to another and stays. io_uring would
be another way to such calls. Standard library only: an isolated interpreter loads it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_CALLS = {"x86_64": (0xC000003E, 41, 53), "aarch64": (0xC00000B7, 198, 199)}
"""Machine -> AUDIT_ARCH, socket and socketpair."""
_IO_URING_SETUP = 425
_X32 = 0x40000000  # calls of another ABI of x86-64, with numbers of their own
_AF_UNIX = 1
_IN_A_NAMESPACE = (2, 10, 16)  # AF_INET, AF_INET6, AF_NETLINK
_OTHER_TYPES = 0xE  # bits of every type of socket but SOCK_STREAM
_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data, little-endian
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
_PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 21, 22, 38
_MODE_FILTER = 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def can_refuse() -> bool:
    """Whether `refuse` works here: another machine has other numbers."""
    return (
        platform.machine() in _CALLS and ctypes.CDLL(None).prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0
    )


def refuse() -> bool:
    """Confine this process and its children; False where it cannot be had. OSError if the kernel
    refuses."""
    if not can_refuse():
        return False
    code = _filter(*_CALLS[platform.machine()])
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return True


def _filter(arch: int, socket: int, socketpair: int) -> bytes:
    """The program in BPF: what each step does, with which value, and where it goes if so or not."""
    allow, refuse_ = 15, 16
    internet, internet6, netlink = _IN_A_NAMESPACE
    steps = (
        (_LOAD, _ARCH),
        (_IF_EQUAL, arch, 2, refuse_),
        (_LOAD, _NUMBER),
        (_IF_ABOVE, _X32, refuse_, 4),
        (_IF_EQUAL, _IO_URING_SETUP, refuse_, 5),
        (_IF_EQUAL, socket, 6, 10),
        (_LOAD, _FIRST),
        (_IF_EQUAL, internet, allow, 8),
        (_IF_EQUAL, internet6, allow, 9),
        (_IF_EQUAL, netlink, allow, refuse_),
        (_IF_EQUAL, socketpair, 11, allow),
        (_LOAD, _FIRST),
        (_IF_EQUAL, _AF_UNIX, 13, refuse_),
        (_LOAD, _SECOND),
        (_IF_BITS, _OTHER_TYPES, refuse_, allow),
        (_RETURN, _ALLOW),
        (_RETURN, _REFUSE),
    )
    packed = []
    for number, (code, value, *places) in enumerate(steps):
        skipped = [place - number - 1 for place in places] or [0, 0]
        packed.append(struct.pack("=HBBI", code, *skipped, value))
    return b"".join(packed)
