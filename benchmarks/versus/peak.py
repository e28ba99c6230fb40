"""The machine's GEMM peak: fp32, on all the cores that the trainers share."""

from __future__ import annotations

import time

import torch

SIZE, SECONDS, CALLS = 2048, 5.0, 4


def gemm_flops(num_threads: int) -> float:
    """Operations a second of one matrix product, in a process of its own. The best of some short
    stretches: what the cores can do, not what others left of them."""
    torch.set_num_threads(num_threads)
    a, b, out = (torch.randn(SIZE, SIZE) for _ in range(3))
    best, end = 0.0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.mm(a, b, out=out)
        best = max(best, CALLS * 2 * SIZE**3 / (time.perf_counter() - start))
    return best
