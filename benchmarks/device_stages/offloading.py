"""Stage `offload`: training goes on in the same bits after its memory has been away; GB/s."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_stages import tiny
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

BYTES = {"cpu": 64 * 2**20, "cuda": 4 * 2**30}
ROUNDS = 3


def run(device: torch.device) -> dict[str, Any]:
    with tiny.alone(device) as folder:
        stayed, went = trained(folder, away=False), trained(folder, away=True)
    assert all(torch.equal(a, b) for a, b in zip(stayed, went, strict=True)), "other bits"
    return {"equal_bits": True, "tensors": len(went)} | speed(device)


def trained(folder: Any, *, away: bool) -> list[Tensor]:
    """Main params and moments after two SFPO steps; `away`: offloaded before each."""
    from sfpo_megatron.mcore import setup
    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.offload import Offload
    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.objectives.objective import PolicyObjective

    config = tiny.run_config(folder, "local", "bfloat16")
    policy, _ = tiny.build(config)
    objective, snapshot = PolicyObjective.of(config), SlowSnapshot(policy.shards)
    offload = Offload(policy, snapshot.buffers)
    for step in range(2):
        if away:
            offload.make_room()
            offload.offload()
            offload.onload()
        minibatches = cut(config, policy, tiny.batch(step))
        set_old_logprobs(minibatches, compute_logprobs(policy, minibatches, temperature=1.0))
        one_pass = partial(run_pass, policy, minibatches, objective)
        sfpo_step(one_pass, snapshot, num_fast_passes=tiny.K, alpha=tiny.ALPHA)
    found = [t.detach().cpu().clone() for t in (*policy.shards.tensors(), *policy.shards.moments())]
    setup.shut_down()
    return found


def speed(device: torch.device) -> dict[str, float]:
    """GB/s each way of one large storage, the best of a few rounds; the first makes the buffer."""
    from sfpo_megatron.mcore.offload import Offload

    param = torch.nn.Parameter(torch.ones(BYTES[device.type] // 4, device=device))
    policy: Any = SimpleNamespace(
        chunks=[torch.nn.ParameterList([param])],
        optimizer=SimpleNamespace(zero_grad=lambda: None),
        shards=SimpleNamespace(params_ready=lambda: None, storages=lambda: (), on_device=True),
    )
    offload, seconds = Offload(policy), {"offload": list[float](), "onload": list[float]()}
    for _ in range(1 + ROUNDS):
        for name, move in (("offload", offload.offload), ("onload", offload.onload)):
            begun = time.perf_counter()
            move()
            seconds[name].append(time.perf_counter() - begun)
    assert bool((param == 1).all()), "the storage did not come back"
    num_bytes = param.untyped_storage().nbytes()
    return {f"{name}_gb_per_s": num_bytes / min(s[1:]) / 1e9 for name, s in seconds.items()}
