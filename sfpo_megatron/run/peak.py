"""The trainer's peak: operations a second that `speed/mfu` is a share of.

GPUs have the vendor's figure. Cores have none that holds for a machine (clock, SMT, who else runs),
so a matrix product of the model's dtype is timed.
"""

from __future__ import annotations

import time

import torch

from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.planner.hardware import gpu_named

_SIZE = 512
"""Elements of each side: large enough for the cores' full speed, some milliseconds of one core."""
_MEASURED_S = 0.05
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def trainer_peak_flops(policy: Policy) -> float:
    """Peak of all ranks together; 0 where it is not known. On CPU every rank measures in the same
    moment, since ranks share cores, and the sum counts. Collective."""
    if torch.cuda.is_available():
        return policy.control.size * gpu_peak_flops(policy.dtype)
    policy.control.barrier()
    own = measured_flops(_DTYPES[policy.dtype])
    return float(policy.control.sum(torch.tensor([own], dtype=torch.float64)))


def gpu_peak_flops(dtype: str) -> float:
    """Peak of one GPU; 0 where it is not known."""
    if dtype == "float32":
        return 0.0
    gpu = gpu_named(torch.cuda.get_device_name())
    return gpu.flops if gpu is not None else 0.0


def measured_flops(dtype: torch.dtype) -> float:
    """Operations a second of one square matrix product on this process's threads: the mean over
    tens of milliseconds, not the best, which on shared cores is when the other ranks wait."""
    a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)  # the first call picks a kernel and packs
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _MEASURED_S or not calls:
        torch.mm(a, b, out=out)
        calls += 1
    return calls * 2 * _SIZE**3 / elapsed
