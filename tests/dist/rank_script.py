"""A rank for test_launcher.py: `python -m rank_script MODE OUTPUT_DIR`, real gloo, no model.

MODE begins with `plain_` under a torchrun that is not our launcher's.
"""

from __future__ import annotations

import signal
import sys

# As sfpo_megatron/__main__.py does before what takes long.
signal.signal(signal.SIGINT, lambda signum, frame: sys.exit(128 + signum))

import atexit  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from sfpo_megatron.config.load import ConfigError  # noqa: E402
from sfpo_megatron.host import peers  # noqa: E402
from sfpo_megatron.launcher import rank as worker  # noqa: E402
from sfpo_megatron.outputs.directory import RunDirectory  # noqa: E402


def run(mode: str, folder: Path) -> bool:
    """What the mode says, with a process of its own in another session (as Ray's are)."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / f"pids_{rank}").write_text(f"{os.getpid()} {child.pid}")
    try:
        act(mode, rank, dist, folder)
        dist.destroy_process_group()  # as a run does: gloo's threads may abort a Python that ends
        return mode in ("stop", "stop_slowly")
    finally:
        if mode != "kill":
            child.kill()
        (folder / f"closed_{rank}").touch()


def act(mode: str, rank: int, dist: object, folder: Path) -> None:
    from torch.distributed import barrier, distributed_c10d

    barrier()
    if mode == "ok":
        return
    if mode == "signal_at_exit":  # as torchrun's, where another rank has died
        if rank == 0:
            atexit.register(os.kill, os.getpid(), signal.SIGTERM)
        return
    if mode == "config":
        raise ConfigError("file", "key", found="a", expected="b", fix="c")
    if mode == "raise" and rank == 1:
        time.sleep(0.5)
        raise ValueError("two\nlines")
    if mode in ("kill", "kill_while_stuck", "stop_kill") and rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "kill_while_stuck":  # in C++, where no Python signal handler runs
        distributed_c10d._get_default_store().wait(["never"])
    if mode == "stop":
        while not RunDirectory(folder).stop_file.exists():
            time.sleep(0.05)
        return
    if mode == "stop_slowly":  # a rank 0 that has the signal itself, as at the end of a job
        from sfpo_megatron.mcore.control import ControlGroup
        from sfpo_megatron.run.together import end_together

        control = ControlGroup(60.0)
        peers.watch_peers([int((folder / "pids_1").read_text().split()[0])])
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2 * worker.CLOSING_TIME_S)  # it verifies the checkpoint
        end_together(control)
        if rank == 0:
            time.sleep(2 * worker.CLOSING_TIME_S)  # it closes the engines
        return
    if mode == "stop_kill":  # as rank 0 does while it waits for rollouts
        peers.watch_peers([int((folder / "pids_1").read_text().split()[0])])
        while peers.lost_peer() is None:
            time.sleep(0.05)
        raise peers.PeerLostError("another rank is gone")
    if mode == "stop_never":
        time.sleep(600)
    if mode == "sleep":
        time.sleep(600)
    barrier()


if __name__ == "__main__":
    worker.CLOSING_TIME_S = 2.0
    mode, folder = sys.argv[1].removeprefix("plain_"), sys.argv[2]
    raise SystemExit(
        worker.run_rank(
            lambda: run(mode, Path(folder)),
            directory=RunDirectory.of(folder),
            launched=not sys.argv[1].startswith("plain_"),
            saves_when_stopped=mode.startswith("stop"),
        )
    )
