"""`python -m sfpo_megatron ...`, `sfpo-megatron ...` and `torchrun -m sfpo_megatron ...`."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line, so that Ctrl-C while it is imported ends it as well as later on."""
    signal.signal(signal.SIGINT, _interrupt)
    if sys.platform == "win32":  # where the command line cannot even be imported: no fcntl, no pwd
        from sfpo_megatron.commands.install import CannotInstall, expect_linux

        try:
            expect_linux()
        except CannotInstall as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    try:
        from sfpo_megatron.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Once: what ends the program in good order is not interrupted by a second Ctrl-C."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


# Dist-checkpoint writers and reward workers spawn: they import this file.
if __name__ == "__main__":
    raise SystemExit(main())
