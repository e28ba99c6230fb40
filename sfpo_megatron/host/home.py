"""A home directory and a user name for libraries that ask for them. Standard library only.

vLLM, Triton and Ray write below HOME, torch names its caches after the user: in a container whose
user id has no entry in the passwd file, or on a node where homes are read-only or absent, each of
them ends with an error of its own that names none of this.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

_READ_THERE = {
    "HF_HOME": ".cache/huggingface",
    "RAY_AUTH_TOKEN_PATH": ".ray/auth_token",
    "NETRC": ".netrc",
}
"""What libraries read below a home that cannot be written, by the variable that names it."""
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # as getpass.getuser asks


class NoHome(RuntimeError):
    """There is no directory that could serve as HOME; one line says what to set."""


def provide_home(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Set HOME, LOGNAME and USER where they are missing or of no use; what was done, in a line, if
    caches do not go where the user would look for them. Raises NoHome."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
    if not any(environ.get(name) for name in _NAMES):
        environ["LOGNAME"] = environ["USER"] = entry.pw_name if entry else f"uid-{os.getuid()}"
    given = environ.get("HOME", "")
    home = given or (entry.pw_dir if entry else "")
    if home and can_be_written(home):
        environ["HOME"] = home  # Ray asks nobody else
        return None
    environ["HOME"] = _own_home()
    for name, below in _READ_THERE.items():
        if home and os.access(path := os.path.join(home, below), os.R_OK):
            environ.setdefault(name, path)
    found = f"{home}, which cannot be written" if home else "none"
    return f"HOME: found {found}; caches of this run go to {environ['HOME']}"


def can_be_written(folder: str) -> bool:
    """Whether a directory can be made in `folder`: permissions do not say it all."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".sfpo-"):
            return True
    except OSError:
        return False


def _own_home() -> str:
    """A directory that only this user can enter, the same in every process of a run."""
    home = Path(tempfile.gettempdir()) / f"sfpo-home-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
    except OSError as error:
        raise NoHome(
            f"HOME: found none that can be written, and {home} cannot be made ({error.strerror}), "
            "expected a directory for caches; set HOME or TMPDIR to one"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or home.is_symlink():
        raise NoHome(
            f"HOME: found none that can be written, and {home} is not this user's alone, expected "
            "a directory for caches; set HOME or TMPDIR to one"
        )
    return str(home)
