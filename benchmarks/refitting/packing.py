"""How fast vLLM packs GEMM weights on this CPU: the one hop of a refit that is no plain copy.

    python -m benchmarks.refitting.packing SIZES...     rows and columns, by comma; prints GB/s

As in an engine: one thread, the same allocator settings, each packed form beside the last one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import provenance

Shape = tuple[int, int]


def pack_gb_per_s(shapes: Sequence[Shape]) -> float:
    """Bytes of bf16 weights of these shapes that an engine's process packs in a second."""
    from sfpo_megatron.rollout.actor_variables import actor_variables

    sizes = [f"{rows},{columns}" for rows, columns in shapes]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.refitting.packing", *sizes],
        env=os.environ | actor_variables("engine", on_gpu=False, is_restart=True),
        cwd=provenance.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    import torch
    import vllm._custom_ops as ops
    from vllm.platforms import current_platform

    torch.set_num_threads(1)
    current_platform.import_kernels()
    weights = [
        torch.ones(*(int(size) for size in argument.split(",")), dtype=torch.bfloat16)
        for argument in arguments
    ]
    packed: list[Any] = [None] * len(weights)
    best = float("inf")
    for _ in range(4):  # the first one maps the memory
        began = time.perf_counter()
        for number, weight in enumerate(weights):
            packed[number] = ops.create_onednn_mm(weight.t(), 1)
        best = min(best, time.perf_counter() - began)
    print(sum(weight.nbytes for weight in weights) / best / 1e9)


if __name__ == "__main__":
    main(sys.argv[1:])
