"""Host memory of our own that a CUDA device copies from and to: page-locked in place, not forked.

Copies from and to page-locked memory run beside the host and the current stream. torch's pinned
allocator would round each buffer up to a power of two.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_CUDA_HOST_REGISTER_PORTABLE = 1  # for every CUDA context


def host_buffer(num_bytes: int) -> Tensor:
    """Memory in whole pages, all zero, that processes forked from here do not have: [num_bytes]
    uint8.

    Linux copies pages that a device may write, at once instead of on write, into whatever is forked
    (`copy_present_page` in mm/memory.c): the writer of each checkpoint would get, and take the time
    of, a second copy of what it never reads.
    """
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.uint8)


def pin(buffer: Tensor, *, owner: object, key: str, found: str, instead: str) -> None:
    """Page-lock `buffer` until `owner` is collected. RuntimeError if the system refuses; it says
    that the setting `key` was `found` and that `instead` needs no such memory."""
    code = int(
        torch.cuda.cudart().cudaHostRegister(
            buffer.data_ptr(), buffer.nbytes, _CUDA_HOST_REGISTER_PORTABLE
        )
    )
    if code:
        _forget_error()
        raise RuntimeError(
            f"{key}: found {found}, but {buffer.nbytes} bytes of host memory cannot be page-locked "
            f"(CUDA error {code}); free host memory or set {key}={instead}"
        )

    def unpin() -> None:
        torch.cuda.synchronize()  # a copy may still be under way
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    # At exit the driver lets go of everything by itself, in an order of its own.
    weakref.finalize(owner, unpin).atexit = False


def _forget_error() -> None:
    """Use up the refusal, which CUDA's runtime keeps for this thread's next look for errors: that
    of the next kernel that torch starts, which would raise it as its own
    (C10_CUDA_KERNEL_LAUNCH_CHECK; torch's binding of cudaHostRegister leaves it there)."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
