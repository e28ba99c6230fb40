"""Writes a sharded state dict: to the host at once, to the disk in the background.

Megatron's writer forks a process for each file. It collects their results through a manager
process, which a killed run leaves behind; a file beside the checkpoint takes its place here.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import pickle
import queue
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from sfpo_megatron.checkpoints.manifest import FileDigest
from sfpo_megatron.host.listing import paths_in
from sfpo_megatron.host.peers import PeerWriteError
from sfpo_megatron.host.processes import end_with_parent

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

_NOTE = ".note-"  # ours, beside the files of a checkpoint that is being written
_FILES_PER_RANK = 2
_Results: TypeAlias = dict[int, list[WriteResult]] | Exception


class _ResultsFile:
    """The part of a queue that Megatron's writer uses: one `put` by the writing process, one
    `get_nowait` by the process that forked it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, results: _Results) -> None:
        self._path.write_bytes(pickle.dumps(results))

    def get_nowait(self) -> _Results:
        try:
            return pickle.loads(self._path.read_bytes())  # noqa: S301 (by our own child)
        except FileNotFoundError:
            raise queue.Empty from None


class Writing:
    """A checkpoint on its way to the disk. `finish` is collective, `is_done` and `join` are not."""

    def __init__(self, request: AsyncRequest, directory: Path) -> None:
        self._request = request
        self._directory = directory
        self._process: BaseProcess | None = None
        self._staged: list[Sequence[Any]] = []
        self.seconds = 0.0
        """How long the slowest writer and what is done after them took; on rank 0, after
        `finish`."""
        arguments = list(request.async_fn_args)
        if request.async_fn is None:
            return  # all that this rank holds is written by others
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # device tensors to the host
        begun = time.monotonic()
        target = partial(_write, request.async_fn, directory, dist.get_rank(), begun)
        # fork: it sees the tensors as they are now, without a copy. Page-locked memory is shared
        # with it, not copied on write: given back to torch's allocator, the next tensor there would
        # be written into the checkpoint. multiprocessing drops its own reference in `start`.
        self._staged.append(arguments)
        self._process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
        self._process.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's files are written."""
        return self._process is None or not self._process.is_alive()

    def finish(self) -> dict[str, FileDigest]:
        """Wait for all ranks' files and complete the metadata; on rank 0, the files' digests as
        their writers read them back. Collective. Raises on every rank if one could not write."""
        if self._process is not None:
            self._process.join()
        self._staged.clear()
        _give_back_page_locked()
        dist.barrier()
        begun = time.monotonic()
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:  # no Exception: nothing above would catch it
            raise _what_failed(error) from error
        dist.barrier()
        if dist.get_rank() != 0:
            return {}
        digests, slowest_s = _take_notes(self._directory)
        self.seconds = slowest_s + time.monotonic() - begun
        return digests


def _give_back_page_locked() -> None:
    """Hand to the system what torch's allocator of page-locked memory has free: from the first save
    on it would keep as much as a save takes."""
    # `make gpu` runs with the torch that is there, and an older one may not have it.
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()


def _what_failed(error: CheckpointException) -> OSError | PeerWriteError:
    """The failure of this rank's writer, the operating system's words before torch's; if it had
    none, that of another rank's."""
    found = sorted(
        (str(each[0]) for each in error.failures.values()), key=lambda t: "[Errno" not in t
    )
    if not found:
        return PeerWriteError("another rank could not write its files")
    if "inline_container" in found[0]:  # torch's file writer, which keeps the reason to itself
        return OSError(f"a write came short, as on a full disk ({found[0].splitlines()[0]})")
    if "<class" in found[0]:  # Megatron 0.19 gives an exception's type for its text
        return OSError(f"a writer failed and did not say why, as on a full disk ({found[0]})")
    return OSError(found[0])


def start_writing(state: ShardedStateDict, directory: Path, *, content: dict[str, Any]) -> Writing:
    """Begin to write `state` into the empty `directory`. Collective."""
    filesystem_async._results_queue = _ResultsFile(directory / f"{_NOTE}results-{dist.get_rank()}")
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_FILES_PER_RANK)
    # From 0.19 on Megatron recommends another package's writer, once in each process (docs/gpu.md
    # says why it is not taken); saves that are not asynchronous have this one alone.
    own = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    torch_strategy._logged_mcore_async_deprecation = True
    request = dist_checkpointing.save(
        state,
        str(directory),
        sharded_strategy=strategy,
        async_sharded_save=True,
        content_metadata=content,
        **({"async_strategy": "mcore"} if own else {}),
    )
    return Writing(request, directory)


def _write(
    write: Callable[..., None], directory: Path, rank: int, begun: float, *arguments: Any
) -> None:
    """Write, then read back for the manifest; runs in the process forked at `begun`, by a clock
    that the machine's processes share."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    write(*arguments)
    digests = {}
    for path, name, _ in arguments[1]:
        found = FileDigest.of(Path(path))
        digests[name] = [found.num_bytes, found.sha256]
    note = {"digests": digests, "seconds": time.monotonic() - begun}
    (directory / f"{_NOTE}digests-{rank}").write_text(json.dumps(note), encoding="utf-8")


def _take_notes(directory: Path) -> tuple[dict[str, FileDigest], float]:
    """Read and remove what the writers left for us: digests by file, seconds of the slowest."""
    found, slowest_s = {}, 0.0
    for note in paths_in(directory, begin=f"{_NOTE}digests-"):
        left = json.loads(note.read_text(encoding="utf-8"))
        slowest_s = max(slowest_s, left["seconds"])
        for name, (num_bytes, sha256) in left["digests"].items():
            found[name] = FileDigest(num_bytes=num_bytes, sha256=sha256)
    for note in paths_in(directory, begin=_NOTE):
        note.unlink()
    return found, slowest_s
