"""The folder of a cluster of our own: nobody else's, and gone at the end."""

from __future__ import annotations

import subprocess
import sys

OWN = """
import os
from sfpo_megatron.host.temporary import temporary_folder
from sfpo_megatron.rollout.cluster import start_cluster, stop_cluster
with temporary_folder() as folder:
    assert start_cluster()
    print(oct(os.stat(folder).st_mode & 0o777))
    stop_cluster()
print(os.path.exists(folder))
"""


def test_no_other_user_can_write_there() -> None:
    """Ray makes its folder writable for all."""
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0o700", "False"], done.stderr
