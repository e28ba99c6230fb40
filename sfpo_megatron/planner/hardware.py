"""GPUs, and the constants that turn sizes into seconds. No torch.

Peaks are the vendors' (dense bf16, bandwidths of one direction). What is reached of them is set so
that published step breakdowns come out (planner/published.py): a guess for any other machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(kw_only=True, frozen=True, slots=True)
class Gpu:
    """One kind of GPU in nodes of eight."""

    name: str
    memory_bytes: int
    """What a process can allocate."""
    flops: float
    """Peak of dense bf16, a second."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """Rate to another GPU of the node."""
    network_bytes_per_s: float = 50e9
    """Rate to a GPU of another node: 400 Gbit/s each."""
    moe_mfu: float = 0.15
    """Share of the peak that training reaches where most of the work is in small experts."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100-80gb",
            memory_bytes=int(79.1 * GIB),
            flops=989e12,
            hbm_bytes_per_s=3.35e12,
            link_bytes_per_s=450e9,
        ),
        Gpu(
            name="h200-141gb",
            memory_bytes=int(139.8 * GIB),
            flops=989e12,
            hbm_bytes_per_s=4.8e12,
            link_bytes_per_s=450e9,
        ),
        Gpu(
            name="h20-96gb",
            memory_bytes=int(95.1 * GIB),
            flops=148e12,
            hbm_bytes_per_s=4.0e12,
            link_bytes_per_s=450e9,
            moe_mfu=0.21,
        ),
        Gpu(
            name="a100-80gb",
            memory_bytes=int(79.1 * GIB),
            flops=312e12,
            hbm_bytes_per_s=2.0e12,
            link_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            moe_mfu=0.25,
        ),
    )
}


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU that CUDA gives this name, such as "NVIDIA H100 80GB HBM3"; None for one that is not
    in the table. The cards with another cooling than SXM have other peaks."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if "nvl" in words or ("pcie" in words and "a100" not in words):
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words), None)


DENSE_MFU = 0.38
"""Share of the peak that a dense model's forward and backward reach, waiting for peers apart."""
PREFILL_MFU = 0.4
HBM_SHARE = 0.7
"""Share of the memory's bandwidth that is reached, in decoding and in the optimizer."""
LINK_SHARE = 0.7
"""Share of a link's or the network's bandwidth that is reached, in large collectives."""
PCIE_BYTES_PER_S = 25e9
"""Between GPU and page-locked host memory."""
AWAY_BYTES = 3 * GIB
"""What a process keeps of a GPU while the other one has its turn (rollout.placement: colocated):
contexts, communicators, CUDA graphs."""
DECODE_STEP_S = 5e-3
"""Scheduling, sampling and launches of one decoding step with CUDA graphs."""
EAGER_LAYER_S = 0.75e-3
"""The same for each layer without CUDA graphs (enforce_eager)."""
REFIT_S, REFIT_BYTES_PER_S = 3.6, 13.6e9
"""Pausing, re-packing and resuming engines; then the weights, through one sender."""
USABLE_MEMORY = 0.92
"""The rest: CUDA's context, NCCL's buffers, fragments."""
