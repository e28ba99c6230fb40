"""ControlGroup: broadcasts of every dtype, agreement, and a lost peer reported within 30 s.

Not exercised here: several hosts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import DP2, TP1, on_ranks
from made.bits import same_bits

if TYPE_CHECKING:
    from workbench import Workbench

DTYPES = [
    torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
]  # fmt: skip
LOST_PEER = """
import os, sys, time
import torch, torch.distributed as dist
from sfpo_megatron.host.peers import PeerLostError
from sfpo_megatron.mcore.control import ControlGroup
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
control = ControlGroup(timeout_s=float(sys.argv[3]))
control.barrier()
if rank == 1:
    if sys.argv[4] == "dies":
        os._exit(9)
    time.sleep(60)  # alive and silent
start = time.monotonic()
try:
    control.broadcast_json({"step": 1})
    control.barrier()
except PeerLostError as error:
    print(f"{time.monotonic() - start:.1f} {error}", flush=True)
    os._exit(0)
os._exit(1)
"""


@on_ranks(TP1, DP2)
def test_broadcast_every_dtype_and_empty_tensors(bench: Workbench) -> None:
    from sfpo_megatron.mcore.control import ControlGroup

    control = ControlGroup(60.0)
    random = torch.Generator().manual_seed(3)
    sent = {
        f"{dtype}{shape}": torch.randint(0, 2, shape, generator=random).to(dtype)
        for dtype in DTYPES
        for shape in [(5,), (2, 3), (0,), (3, 0)]
    }
    sent["not contiguous"] = torch.arange(12).view(3, 4).t()
    got = control.broadcast(sent if bench.rank == 0 else None)
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        assert got[name].shape == tensor.shape and same_bits(got[name], tensor), name
    value = {"step": 3, "text": "π", "list": [1.5, None, True]}
    assert control.broadcast_json(value if bench.rank == 0 else None) == value


@on_ranks(DP2)
def test_sums_and_agreement(bench: Workbench) -> None:
    from sfpo_megatron.mcore.control import ControlGroup

    control = ControlGroup(60.0)
    mine = torch.tensor([bench.rank, 2**53 + bench.rank], dtype=torch.int64)
    assert control.sum(mine).tolist() == [1, 2**54 + 1]
    assert mine.tolist() == [bench.rank, 2**53 + bench.rank], "the argument was changed"
    assert control.max(mine).tolist() == [1, 2**53 + 1]
    control.agree(step=4, passes=0, negative=-1)
    try:
        control.agree(step=4, passes=bench.rank)
    except RuntimeError as error:
        assert "passes is 0 on one rank and 1 on another" in str(error)
        assert f"rank {bench.rank} has {bench.rank}" in str(error)
    else:
        raise AssertionError("a difference was not reported on this rank")
    control.agree(step=5)  # and the group still works


def lost_peer(tmp_path: Path, timeout_s: float, how: str) -> str:
    """What rank 0 said about a rank 1 that `dies` or stays `silent`: "SECONDS MESSAGE"."""
    script = tmp_path / "lost_peer.py"
    script.write_text(LOST_PEER)
    command = [sys.executable, str(script)]
    arguments = [str(tmp_path / "store"), str(timeout_s), how]
    ranks = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said, _ = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 0, said
        return said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_dead_peer_is_reported_at_once(tmp_path: Path) -> None:
    """The timeout is long; the closed connection is what tells."""
    start = time.monotonic()
    seconds, _, message = lost_peer(tmp_path, 600.0, "dies").partition(" ")
    assert float(seconds) < 30 and time.monotonic() - start < 80
    assert message.startswith("rank 0 lost a peer or timed out")


def test_a_silent_peer_is_reported_at_the_timeout(tmp_path: Path) -> None:
    seconds, _, message = lost_peer(tmp_path, 3.0, "silent").partition(" ")
    assert 2 < float(seconds) < 30
    assert message.startswith("rank 0 lost a peer or timed out")
