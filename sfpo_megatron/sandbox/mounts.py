"""A program's own mounts: all that there is, read-only, and an empty folder of limited size.

Landlock keeps a program from other files' content, but not from their modes, times and attributes,
of which it could change those of every file of this user: no mount is writable but its folder. That
is in memory, and what is left in it is gone with the program.

    python -I mounts.py FOLDER NAMESPACE     try it, in a namespace of its own: the exit code says

Linux 5.12 or newer. Standard library only: an isolated interpreter loads it.
"""

from __future__ import annotations

import ctypes
import os
import sys

FOLDER_BYTES = 64 << 20
"""How much a program may have in its folder."""
_MOST_FILES = 20_000
_MOUNT_SETATTR = 442  # the same on x86-64 and on ARM
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY = 1
_NOSUID_NODEV = 0b110


class _Attributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


def namespace() -> int:
    """The number of this process's mount namespace."""
    return os.stat("/proc/self/ns/mnt").st_ino


def keep_to(folder: str, *, outer: int) -> None:
    """Make all mounts read-only, and `folder` an empty one that is not; it is the working directory
    then. `outer`: the namespace whose mounts must stay as they are; RuntimeError in that one."""
    if namespace() == outer:
        raise RuntimeError("this process has no mounts of its own")
    libc = ctypes.CDLL(None, use_errno=True)
    readonly = ctypes.byref(_Attributes(set=_ATTR_RDONLY))
    size = ctypes.sizeof(_Attributes)
    _checked(libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, readonly, size))
    options = f"size={FOLDER_BYTES},nr_inodes={_MOST_FILES},mode=700".encode()
    _checked(libc.mount(b"none", os.fsencode(folder), b"tmpfs", _NOSUID_NODEV, options))
    os.chdir(folder)


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    keep_to(sys.argv[1], outer=int(sys.argv[2]))
