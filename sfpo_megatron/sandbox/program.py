"""Run by an isolated interpreter: limits itself, then does with a program what stdin asks for.

The first line of stdin is {"mode", "folder", "memory_bytes", "file_bytes", "cpu_s",
"limits_processes", "outer_mounts", "imports", "begun", ...}; `mode` is the file beside this one
that takes it from there, and the time when it does, its imports loaded, is written to descriptor
`begun`. Standard library only, and of this package only files in this folder: the interpreter has
no other path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from contextlib import suppress
from types import ModuleType
from typing import Any

_SEEN = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_NUM_PROCESSES = 64
_LEAST_PID_MAX = 301  # the kernel takes no less


def main() -> int:
    """The exit status."""
    given = json.loads(sys.stdin.readline())
    names = (given["mode"], "privileges", "landlock", "mounts", "sockets")
    mode, *walls = map(_beside, names)  # while files can still be read
    limit(given, *walls)
    for name in given.get("imports", ()):
        with suppress(Exception):  # what needs it finds out
            importlib.import_module(name)
    if "begun" in given:  # the same clock as the parent's
        os.write(given["begun"], b"%f\n" % time.monotonic())
        os.close(given["begun"])
    status: int = mode.main(given)
    return status


def limit(
    given: dict[str, Any],
    privileges: ModuleType,
    landlock: ModuleType,
    mounts: ModuleType,
    sockets: ModuleType,
) -> None:
    """Limit this process and what it starts, before the program is run."""
    cpu_s = int(given["cpu_s"]) + 1
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, given["memory_bytes"]),
        (resource.RLIMIT_FSIZE, given["file_bytes"]),
        (resource.RLIMIT_CPU, cpu_s),
    ):
        resource.setrlimit(what, (most, most))
    if os.getpid() == 1:  # it ends with `unshare`, whatever its group
        os.setsid()  # the kernel's share of a session, however many processes there are
    if given["limits_processes"] == "rlimit":
        resource.setrlimit(resource.RLIMIT_NPROC, (_NUM_PROCESSES, _NUM_PROCESSES))
    elif given["limits_processes"] == "pid_max" and os.getpid() == 1:
        with open("/proc/sys/kernel/pid_max", "w", encoding="ascii") as pid_max:
            pid_max.write(str(_LEAST_PID_MAX))
    if given["outer_mounts"]:
        mounts.keep_to(given["folder"], outer=given["outer_mounts"])
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    landlock.restrict(
        readable=(*_SEEN, *_DEVICES, *prefixes, sys.prefix, sys.base_prefix),
        writable=(given["folder"], "/dev/null"),
    )
    sockets.refuse()
    privileges.drop()


def _beside(name: str) -> ModuleType:
    """A file beside this one, without the package that it is in."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    status = main()
    try:
        sys.stdout.flush()
    except Exception:  # it has printed more than it may, or put something else there
        os._exit(status or 1)
    sys.exit(status)
