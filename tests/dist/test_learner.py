"""The learner around a train step: ticks of the schedule, and what the entropy gate sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import references
from harness import TP1, on_ranks

from sfpo_megatron.sfpo import sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(TP1)
def test_one_tick_a_step_and_the_slow_corrections_entropy(bench: Workbench) -> None:
    """lr of the metrics after s of 4 steps of warm-up is s / 4 of the peak, with K = 3 fast passes;
    the gate's window holds the entropy of the last pass, not of the first."""
    from made.batches import make_batch

    from sfpo_megatron.mcore import setup
    from sfpo_megatron.run.learner import Learner, objective_of
    from sfpo_megatron.tracking.timers import Timers

    config = bench.config("qwen2_tied", lr=references.LR)
    schedule = setup.LRSchedule(
        peak=references.LR, floor=0.0, warmup_ticks=4, total_ticks=10, style="constant"
    )
    policy = setup.build_policy(config, bench.capabilities, schedule, model_path=config.model.path)
    learner = Learner(config, policy, objective_of(config))
    entropies = []
    for step in (1, 2):
        timers = Timers()
        saved = references.load_batch(bench.directory, step - 1)
        batch = make_batch(group_size=references.GROUP_SIZE, weight_version=step - 1, **saved)
        prepared = learner.prepare(step, batch, timers)
        k = prepared.num_fast
        assert k == references.K > 1
        with timers("sfpo"):
            results = sfpo_step(
                prepared.one_pass, learner.snapshot, num_fast_passes=k, alpha=references.ALPHA
            )
        learner.observe(results)
        metrics = learner.metrics(prepared, results, timers, {})
        assert metrics["lr"] == pytest.approx(references.LR * step / 4, rel=1e-12)
        assert metrics["pass_1/entropy"] != metrics[f"pass_{k + 1}/entropy"] == metrics["entropy"]
        entropies.append(metrics["entropy"])
    assert learner.gate.state_dict()["window"] == entropies
