"""How a signal ends a rank, told apart from a user's function that calls `sys.exit`.

Standard library only.
"""

from __future__ import annotations

import sys


class Unwound(SystemExit):
    """A signal's handler has raised it, so that `finally` blocks run; nothing may stop it.

    Any other SystemExit is a failure: with code 0 it would end a run as if it had been a success.
    It has to be a SystemExit: of what a handler raises while Ray waits, all but this and
    KeyboardInterrupt is lost there (`check_signals` in Ray's _raylet.pyx).
    """


def failures() -> tuple[type[Exception], type[SystemExit]] | tuple[()]:
    """What `except failures() as error:` catches around a user's code: everything that is raised
    there, `sys.exit` included, and nothing while a signal unwinds the process. It is called when an
    exception has reached the clause, so it can ask which."""
    return () if isinstance(sys.exception(), Unwound) else (Exception, SystemExit)
