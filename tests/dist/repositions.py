"""What must hold around a reposition, whatever the optimizer; gathers counted.

Imported by the test modules, so by pytest's own process too: Megatron inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import references
import torch
from made.bits import all_same_bits, clones
from made.policies import live_params, stale
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy


class WatchedShards:
    """`Policy.shards` that checks each publish: main shards are the lerp, params their bf16."""

    def __init__(self, policy: Policy, alpha: float) -> None:
        self.policy, self.alpha = policy, alpha
        self.slow: list[Tensor] = []
        self.fast: list[Tensor] = []
        self.published = 0

    def tensors(self) -> Any:
        return self.policy.shards.tensors()

    def publish(self) -> None:
        expected = [torch.lerp(s, f, self.alpha) for s, f in zip(self.slow, self.fast, strict=True)]
        assert all_same_bits(self.tensors(), expected)
        for slow, fast, now in zip(self.slow, self.fast, self.tensors(), strict=True):
            written_out = slow.double() + self.alpha * (fast.double() - slow.double())
            torch.testing.assert_close(now.double(), written_out, rtol=3e-7, atol=1e-9)
        self.policy.shards.publish()
        self.policy.shards.params_ready()  # publish only marks the gather as due
        self.published += 1
        assert stale(self.policy) == 0, "after publish, a model param is not bf16(main)"


def watched_steps(bench: Workbench, policy: Policy, count: int) -> WatchedShards:
    shards = WatchedShards(policy, references.ALPHA)
    snapshot = SlowSnapshot(shards)
    for step in range(count):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        shards.slow = clones(shards.tensors())

        def watched(run_pass: Any = run_pass) -> Any:
            result = run_pass()
            shards.fast = clones(shards.tensors())
            return result

        results = sfpo_step(watched, snapshot, num_fast_passes=references.K, alpha=references.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
    return shards


def moved_by_a_null_step(bench: Workbench, policy: Policy) -> list[str]:
    """Which of main and model params an optimizer step with lr = 0 and weight_decay = 0 changes
    after a reposition: any copy of the weights that this did not reach would come back here."""
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    slow = clones(policy.shards.tensors())
    run_pass()
    fast = clones(policy.shards.tensors())
    snapshot.reposition(references.ALPHA)
    policy.shards.params_ready()
    masters, params = clones(policy.shards.tensors()), clones(live_params(policy))
    lerp = [torch.lerp(s, f, references.ALPHA) for s, f in zip(slow, fast, strict=True)]
    assert all_same_bits(masters, lerp) and not all_same_bits(masters, fast)
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert run_pass().num_skipped == 0
    policy.shards.params_ready()
    same = {
        "main params": all_same_bits(masters, policy.shards.tensors()),
        "model params": all_same_bits(params, live_params(policy)),
    }
    return [name for name, is_same in same.items() if not is_same]


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """Sizes of the param all-gathers (one a bucket) that this rank issues inside."""
    from megatron.core.distributed import param_and_grad_buffer

    found: list[int] = []
    original = param_and_grad_buffer.dist_all_gather_func

    def counting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(output.numel())
        return original(output, *args, **kwargs)

    param_and_grad_buffer.dist_all_gather_func = counting
    try:
        yield found
    finally:
        param_and_grad_buffer.dist_all_gather_func = original
