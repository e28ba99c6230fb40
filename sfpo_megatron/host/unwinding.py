"""How a signal ends a rank, told apart from a user's function that calls `sys.exit`.

Standard library only.
"""

from __future__ import annotations


class Unwound(SystemExit):
    """A signal's handler has raised it, so that `finally` blocks run; nothing may stop it.

    Any other SystemExit is a failure: with code 0 it would end a run as if it had been a success.
    """
