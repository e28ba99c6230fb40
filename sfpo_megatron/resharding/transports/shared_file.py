"""One file that two processes of a node map as bytes: in shared memory, else on disk.

The space is reserved when the file is made (`posix_fallocate`): a sparse file on a full /dev/shm
would kill whoever touches the missing page with SIGBUS, in the middle of an update.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import stat
from pathlib import Path

import torch
from torch import Tensor

from sfpo_megatron.host.scratch import note_segment
from sfpo_megatron.snapshots.pinning import pin

SHARED_MEMORY_DIR = Path("/dev/shm")

logger = logging.getLogger(__name__)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write in the file system of `directory`; 0 without it."""
    try:
        status = os.statvfs(directory)
    except FileNotFoundError:
        return 0
    return status.f_bavail * status.f_frsize


def create(num_bytes: int, fallback_dir: Path) -> Path:
    """Make a file of `num_bytes`, for this user only, with its space reserved."""
    try:
        return _reserve(SHARED_MEMORY_DIR, num_bytes)
    except OSError as error:
        logger.warning(
            "refit: no %.1f MiB of shared memory (%s); using a file in %s, which is slower",
            num_bytes / 2**20,
            error,
            fallback_dir,
        )
    fallback_dir.mkdir(parents=True, exist_ok=True)
    try:
        return _reserve(fallback_dir, num_bytes)
    except OSError as error:
        raise OSError(
            f"{fallback_dir}: no room for the refit buffer of {num_bytes} bytes ({error}); free "
            f"space there or in {SHARED_MEMORY_DIR}, or lower refit.bucket_bytes"
        ) from error


def _reserve(directory: Path, num_bytes: int) -> Path:
    if free_bytes(directory) < num_bytes:
        raise OSError(f"{directory} has {free_bytes(directory) / 2**20:.1f} MiB free")
    path = directory / f"sfpo-refit-{os.getpid()}-{secrets.token_hex(8)}"
    note_segment(path)  # it stays for seconds only, but a kill may come in them
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return path


def map_bytes(path: Path, num_bytes: int) -> Tensor:
    """The file's first `num_bytes` as a uint8 tensor that shares memory with every other map."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: the refit buffer of trainer rank 0 is not on this machine; transport shm "
            "needs trainer rank 0 and every engine on one node"
        ) from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path}: not a regular file of this user; refused")
        if status.st_size < num_bytes:
            raise ValueError(f"{path}: found {status.st_size} bytes, expected {num_bytes}")
        shared = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    return torch.frombuffer(shared, dtype=torch.uint8)


class SharedBuffer:
    """The file's bytes in this process, page-locked where a CUDA device copies from or to them: a
    pageable copy goes through a staging buffer of the driver's, at a fraction of the speed."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.bytes = map_bytes(path, num_bytes)
        if not torch.cuda.is_available():
            return
        try:
            pin(self.bytes, owner=self, key="refit.transport", found="shm", instead="nccl_stages")
        except RuntimeError as error:  # it works all the same
            logger.warning("refit will be slower: %s", error)
