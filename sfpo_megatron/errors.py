"""The one form of an error about what a user gave, and of what it quotes. Standard library only."""

from __future__ import annotations

import errno
from typing import TypeVar

E = TypeVar("E", bound=BaseException)
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOEXEC, errno.ENXIO),
)


class WrongInput(Exception):
    """What the user gave is at fault: the same command would end in the same way."""


def may_pass(error: BaseException | None) -> bool:
    """Whether a network or a file system that is away has caused it: it may be back by another
    start. False for a file that is not there or may not be read."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING:
            return True
        seen.append(error)
        error = error.__cause__
    return False


LATER = "start again when the file system is back"


def what_was_met(error: OSError) -> tuple[str, str, str]:
    """(found, expected, fix) of a file or a directory that could not be looked at."""
    if may_pass(error):
        return str(error.strerror), "a file system that answers", LATER
    return str(error.strerror), "what this user may read", "correct the path or its permissions"


class InputError(ValueError, WrongInput):
    """`WHERE: found FOUND, expected EXPECTED; FIX`. `where` is a key, a file, an option or a row;
    empty where only the caller knows it."""

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        at = f"{where}: " if where else ""
        super().__init__(f"{at}found {found}, expected {expected}; {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are made again with `args`, which is the message: other processes could not.
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[E], args: tuple[object, ...]) -> E:
    """An exception without its `__init__`."""
    return kind.__new__(kind, *args)


def shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, so that a message stays on a line or two."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
