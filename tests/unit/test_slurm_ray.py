"""A node's part of the job's Ray cluster, by real bash and where no command of Slurm is.

That the cluster comes together is tests/slurm's business. Not exercised: a real container.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from sfpo_megatron.slurm.render import TEMPLATES


def ray_cluster(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a node's part where no command of Slurm is, with a Python that only writes down how it
    was started."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text(
        f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES;$*" > {folder}/seen\n'
    )
    (programs / "python").chmod(0o755)
    for name in ("bash", "awk", "cut", "hostname", "rm", "seq", "sleep", "touch"):
        (programs / name).symlink_to(str(shutil.which(name)))
    variables = {
        "PATH": str(programs),
        "SLURM_NODEID": "0",
        "SLURMD_NODENAME": "n",
        "SLURM_JOB_ID": f"0-{os.getpid()}",
        "LOGS": str(folder),
        "SFPO_PYTHON": "python",
        "SFPO_RAY_OBJECT_STORE_BYTES": "1",
        "NODE_ADDRESSES": "10.0.0.7 10.0.0.8 -",
        "HEAD_ADDRESS": "127.0.0.1",
        "GPUS_PER_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",  # as Slurm sets it
    }
    with socket.create_server(("127.0.0.1", 0)) as head:
        variables["RAY_PORT"] = str(head.getsockname()[1])
        return subprocess.run(
            ["bash", str(TEMPLATES / "ray_cluster.sh"), *arguments],
            env=variables | environment,
            timeout=30,
            capture_output=True,
            text=True,
        )


@pytest.mark.parametrize(
    ("node", "given", "devices"),
    [
        (0, {"TRAIN_NODES": "2", "RANKS_PER_NODE": "8"}, ""),  # all of them train
        (1, {"TRAIN_NODES": "2", "RANKS_PER_NODE": "6"}, "6,7"),
        (2, {"TRAIN_NODES": "2", "RANKS_PER_NODE": "6"}, "0,1,2,3,4,5,6,7"),
        (0, {}, "0,1,2,3,4,5,6,7"),  # an evaluation
        (
            0,
            {"TRAIN_NODES": "2", "RANKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
            "6,7",
        ),
        (
            0,
            {"TRAIN_NODES": "2", "RANKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"},
            "GPU-b",
        ),
        (0, {"TRAIN_NODES": "2", "RANKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "3"}, ""),
        (0, {"TRAIN_NODES": "2", "RANKS_PER_NODE": "5", "CUDA_VISIBLE_DEVICES": ""}, "5,6,7"),
    ],
)
def test_ray_hands_out_only_what_no_rank_has(
    tmp_path: Path, node: int, given: dict[str, str], devices: str
) -> None:
    ray_cluster(tmp_path, "node", SLURM_NODEID=str(node), **given)
    seen, _, arguments = (tmp_path / "seen").read_text().partition(";")
    assert seen == devices
    assert "start --block" in arguments and "--num-gpus" not in arguments


@pytest.mark.parametrize(
    ("node", "address"), [(0, "10.0.0.7"), (1, "10.0.0.8"), (2, "[0-9]+[.][0-9.]+")]
)
def test_ray_knows_a_node_by_the_jobs_address_in_a_container_too(
    tmp_path: Path, node: int, address: str
) -> None:
    """The third node's nobody knew: it takes its first."""
    ray_cluster(tmp_path, "node", SLURM_NODEID=str(node))
    assert re.search(f" --node-ip-address={address} ", (tmp_path / "seen").read_text())


@pytest.mark.parametrize(("node", "has", "code"), [(0, True, 7), (1, False, 7), (0, False, 1)])
def test_a_container_without_rays_sockets_is_named(
    tmp_path: Path, node: int, has: bool, code: int
) -> None:
    """Only the first node's task is a driver of Ray, which would abort there."""
    folder = Path(f"/tmp/sfpo-ray-0-{os.getpid()}")
    if has:
        folder.mkdir()
    try:
        command = ("bash", "-c", 'exit "$1"', "bash", "7")
        done = ray_cluster(tmp_path, "beside", *command, SLURM_NODEID=str(node))
    finally:
        if has:
            folder.rmdir()
    assert done.returncode == code, done.stderr
    assert ("add /tmp to --container-mounts" in done.stderr) == (code == 1)
    assert (tmp_path / "no-ray-folder").exists() == (code == 1)
