"""What `make` makes of this project's Makefile in an environment that is given."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

MAKE = shutil.which("make") or "make"
MAKEFILE = Path(__file__).parents[2] / "Makefile"


def value(name: str, env: Mapping[str, str]) -> str:
    """The value of one of the Makefile's variables."""
    show = f"show: ; @echo '$({name})'"
    command = [MAKE, "-f", str(MAKEFILE), "--eval", show, "show"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
