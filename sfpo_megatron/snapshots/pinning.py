"""Page-locking of host memory in place. torch's pinned allocator would round up to a power of two.

Copies from and to page-locked memory run beside the host and the current stream.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_CUDA_HOST_REGISTER_PORTABLE = 1  # for every CUDA context


def pin(buffer: Tensor, *, owner: object, key: str, found: str, instead: str) -> None:
    """Page-lock `buffer` until `owner` is collected. RuntimeError if the system refuses; it says
    that the setting `key` was `found` and that `instead` needs no such memory."""
    code = int(
        torch.cuda.cudart().cudaHostRegister(
            buffer.data_ptr(), buffer.nbytes, _CUDA_HOST_REGISTER_PORTABLE
        )
    )
    if code:
        raise RuntimeError(
            f"{key}: found {found}, but {buffer.nbytes} bytes of host memory cannot be page-locked "
            f"(CUDA error {code}); free host memory or set {key}={instead}"
        )

    def unpin() -> None:
        torch.cuda.synchronize()  # a copy may still be under way
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    # At exit the driver lets go of everything by itself, in an order of its own.
    weakref.finalize(owner, unpin).atexit = False
