"""Writing checkpoints: beside the training, on a disk that fills up; and what is not read.

Not exercised: copies from a GPU, other file systems than the test's own.
"""

from __future__ import annotations

import pickle
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from harness import DP2, TP1, TP2, on_ranks
from made.checkpoints import assert_equal, load, save, trained, training_state

if TYPE_CHECKING:
    from workbench import Workbench


def empty_directory(bench: Workbench, name: str) -> Path:
    directory = bench.directory / name
    if bench.rank == 0:
        directory.mkdir()
    dist.barrier()
    return directory


@on_ranks(TP1, DP2, dtype=["float32", "bfloat16"], full=["DP2-float32", "TP1-bfloat16"])
def test_what_is_written_is_the_state_when_it_began(bench: Workbench, dtype: str) -> None:
    """Training goes on while the files are written. The stall is a figure of the case."""
    from sfpo_megatron.checkpoints.manifest import write_manifest
    from sfpo_megatron.mcore.checkpoint import begin_save

    policy = trained(bench, dtype=dtype)
    expected = training_state(bench, policy)
    directory = empty_directory(bench, f"async-{bench.layout.name}-{dtype}")
    begun = time.monotonic()
    writing = begin_save(policy, directory, step=1, form="native")
    stalled = time.monotonic()
    bench.one_pass(policy, bench.prepared(policy, 1))()
    trained_on = time.monotonic()
    digests = writing.finish()
    assert writing.is_done
    bench.figures = {
        "stall_s": stalled - begun,
        "pass_meanwhile_s": trained_on - stalled,
        "finish_s": time.monotonic() - trained_on,
    }
    if bench.rank == 0:
        names = {path.name for path in directory.iterdir()}
        assert {".metadata", "metadata.json"} <= names, names
        assert not list(directory.glob(".note-*"))
        assert 0 < writing.seconds < time.monotonic() - begun
        assert set(digests) == {path.name for path in directory.glob("*.distcp")}
        write_manifest(directory, 1, digests)
    dist.barrier()
    loaded = bench.policy(dtype=dtype)
    load(loaded, directory)
    assert_equal(training_state(bench, loaded), expected)


@on_ranks(TP1, device=["cpu", "cuda"])
def test_what_the_writer_reads_is_kept_until_it_has_ended(bench: Workbench, device: str) -> None:
    """Copies in page-locked memory are shared with the writer, not copied at the fork. Seen here by
    a weak reference to what stands in their place; the writer waits until it has been looked at.
    `cuda` is a torch that says it has a device: once the copies are free, its allocator of such
    memory is emptied."""
    import os
    import weakref
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch

    from sfpo_megatron.mcore.writing import Writing

    directory = empty_directory(bench, f"staged-{device}")
    file = directory / "part.distcp"
    looked_at, look = os.pipe()
    kept: list[weakref.ref[torch.Tensor]] = []

    def stage() -> list[tuple[Path, str, torch.Tensor]]:
        tensor = torch.arange(4.0)
        kept.append(weakref.ref(tensor))
        return [(file, file.name, tensor)]

    def write(_: object, parts: list[tuple[Path, str, torch.Tensor]]) -> None:
        os.read(looked_at, 1)
        file.write_bytes(parts[0][2].numpy().tobytes())

    request = SimpleNamespace(
        async_fn=write, async_fn_args=(None, None), preload_fn=stage, finalize_fns=[]
    )
    writing = Writing(request, directory)
    meanwhile = writing.is_done, kept[0]() is not None
    os.write(look, b"x")
    free_when_emptied: list[bool] = []
    with (
        patch("torch.cuda.is_available", lambda: device == "cuda"),
        patch(
            "torch.accelerator.empty_host_cache",
            lambda: free_when_emptied.append(kept[0]() is None),
        ),
    ):
        digests = writing.finish()
    assert free_when_emptied == ([True] if device == "cuda" else [])
    assert meanwhile == (False, True), "the parent has let go of what its writer still reads"
    assert digests["part.distcp"].num_bytes == 16
    assert kept[0]() is None, "the copies are never given back"
    os.close(look)
    os.close(looked_at)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """In this process and those that it forks, as on a full disk (but EFBIG, not ENOSPC)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@on_ranks(TP1, TP2)
def test_a_write_that_fails_is_an_error_on_every_rank(bench: Workbench) -> None:
    """And the next one, with room, is whole."""
    import pytest

    from sfpo_megatron.host.peers import PeerWriteError
    from sfpo_megatron.mcore.checkpoint import begin_save

    policy = trained(bench)
    directory = empty_directory(bench, f"full-disk-{bench.layout.name}")
    with files_of_at_most(500_000):
        writing = begin_save(policy, directory, step=1, form="native")
        failed = (OSError, PeerWriteError)
        with pytest.raises(failed, match=r"File too large|as on a full disk|another rank"):
            writing.finish()
    save(bench, policy, f"room-again-{bench.layout.name}")


@on_ranks(TP2)
def test_no_room_is_said_before_the_first_byte(bench: Workbench) -> None:
    import shutil
    from unittest.mock import patch

    import pytest

    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.mcore.checkpoint import begin_save

    policy = trained(bench)
    directory = empty_directory(bench, "no-room")
    usage = shutil.disk_usage(directory)._replace(free=1_000_000)
    with (
        patch("shutil.disk_usage", lambda path: usage),
        pytest.raises(CheckpointError, match=r"found 1 MiB free, expected \d+ MiB"),
    ):
        begin_save(policy, directory, step=1, form="native")
    assert not list(directory.iterdir())


class Foreign:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/sfpo-foreign-code",)


@on_ranks(TP1)
def test_foreign_code_in_a_checkpoint_is_not_run(bench: Workbench) -> None:
    """A pickle that names more than the records of a checkpoint, by two ways to say it."""
    import pytest

    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.checkpoints.torch_records import read_metadata

    directory = save(bench, bench.policy(), "foreign")
    read_metadata(directory / ".metadata")
    attribute = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\tos.system\x93."
    for content in (pickle.dumps(Foreign()), attribute, b"", b"\x80\x04N"):
        (directory / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="unknown origin"):
            read_metadata(directory / ".metadata")
    assert not Path("/tmp/sfpo-foreign-code").exists()
