"""The learner around a train step: ticks of the schedule, what the entropy gate sees, whose
log-probs the ratios are to.

Not exercised: an engine; its log-probs are the trainer's with a little noise.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import references
import torch
from harness import DP2, PP2, TP1, on_ranks

from sfpo_megatron.config.objective import ImportanceSamplingConfig, ObjectiveConfig
from sfpo_megatron.sfpo import sfpo_step

if TYPE_CHECKING:
    from torch import Tensor
    from workbench import Workbench

    from sfpo_megatron.config.tree import RunConfig

NOISE = 5e-7
"""Nats between generator and trainer: five times what is measured on one machine."""


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


@on_ranks(TP1)
def test_a_step_that_is_not_made_does_not_tick(bench: Workbench) -> None:
    """A stop request that leaves no time for the passes of a batch that is prepared: saved is the
    schedule of the step before, and after a requeue the step has its own lr."""
    from made.batches import make_batch

    from sfpo_megatron.checkpoints.store import store_of
    from sfpo_megatron.mcore import checkpoint, setup
    from sfpo_megatron.outputs.stopping import StopRun
    from sfpo_megatron.run.learner import Learner, objective_of
    from sfpo_megatron.tracking.timers import Timers

    config = bench.config("qwen2_tied", lr=references.LR)
    saved_in_time = replace(config.checkpoint, must_save_within_s=60.0)
    folder = str(bench.directory / "stopped")
    config = replace(config, output_dir=folder, checkpoint=saved_in_time)
    schedule = setup.LRSchedule(
        peak=references.LR, floor=0.0, warmup_ticks=4, total_ticks=10, style="constant"
    )

    def build() -> tuple[Any, Learner]:
        path = config.model.path
        policy = setup.build_policy(config, bench.capabilities, schedule, model_path=path)
        return policy, Learner(config, policy, objective_of(config))

    batches = [
        make_batch(
            group_size=references.GROUP_SIZE,
            weight_version=step,
            **references.load_batch(bench.directory, step),
        )
        for step in (0, 1)
    ]
    policy, learner = build()
    late: list[str] = []
    checkpoints = _checkpoints(config, policy, late)
    assert checkpoints.resume() == 0
    for step, batch in enumerate(batches, start=1):
        prepared = learner.prepare(step, batch, Timers())
        one_pass = checkpoints.guarded(prepared.one_pass, step=step, num_passes=1)
        if step == 1:
            one_pass()
            late.append("SIGUSR1")
    with pytest.raises(StopRun) as stop:
        one_pass()
    checkpoints.give_up(stop.value)
    ((step, directory),) = store_of(config).steps().items()
    resumed, learner = build()
    checkpoint.load(resumed, directory)
    assert step == resumed.scheduler.num_steps == 1
    learner.prepare(2, batches[1], Timers()).one_pass()
    lr = resumed.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(references.LR * 2 / 4, rel=1e-12)


def _checkpoints(config: RunConfig, policy: Any, late: list[str]) -> Any:
    """A run's, without engines, that has no time left once `late` says why."""
    from sfpo_megatron.checkpoints.store import store_of
    from sfpo_megatron.outputs.stopping import NoStop, OutOfTime
    from sfpo_megatron.run.checkpoints import Checkpoints
    from sfpo_megatron.run.engines import NoEngines
    from sfpo_megatron.run.held_out import Best

    class Late(NoStop):
        def check(self, remaining_s: float = 0.0) -> None:
            if late:
                raise OutOfTime(late[0])

    feed = SimpleNamespace(hand_back=lambda step: None)
    opened: Any = SimpleNamespace(
        start=SimpleNamespace(found=None, run_id="abcdef012345"),
        store=store_of(config),
        ends=SimpleNamespace(stop=Late(), feed=feed, best=Best()),
        progress=print,
        important=print,
    )
    return Checkpoints(config, opened, policy, NoEngines(), {"best": opened.ends.best})


def trained(bench: Workbench, objective: ObjectiveConfig) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights and metrics after two train steps on rollouts whose `generator_logprobs` are those of
    the weights before each step, but for the noise."""
    from made.batches import make_batch

    from sfpo_megatron.mcore import setup
    from sfpo_megatron.mcore.passes import compute_logprobs
    from sfpo_megatron.run import learner as module
    from sfpo_megatron.tracking.timers import Timers

    config = bench.config("qwen2_tied", objective=objective, eps=1e-6)
    schedule = setup.LRSchedule(
        peak=references.LR, floor=0.0, warmup_ticks=0, total_ticks=10, style="constant"
    )
    policy = setup.build_policy(config, bench.capabilities, schedule, model_path=config.model.path)
    learner = module.Learner(config, policy, module.objective_of(config))
    cut, random = module.cut, torch.Generator().manual_seed(bench.rank)

    def generated(*args: Any) -> Any:
        minibatches = cut(*args)
        found = compute_logprobs(policy, minibatches, temperature=1.0)
        for minibatch, values in zip(minibatches, found, strict=True):
            for microbatch, value in zip(minibatch.microbatches, values, strict=False):
                noise = NOISE * torch.randn(value.shape, generator=random)
                microbatch.generator_logprobs = value + noise
        return minibatches

    lines = []
    for step in (1, 2):
        timers = Timers()
        saved = references.load_batch(bench.directory, step - 1)
        batch = make_batch(group_size=references.GROUP_SIZE, weight_version=step - 1, **saved)
        with patch.object(module, "cut", generated):
            prepared = learner.prepare(step, batch, timers)
        with timers("sfpo"):
            results = sfpo_step(
                prepared.one_pass, learner.snapshot, num_fast_passes=2, alpha=references.ALPHA
            )
        lines.append(learner.metrics(prepared, results, timers, {}))
    return bench.hf_weights(policy), lines


@on_ranks(DP2, PP2, sampling=["none", "token"], only=["DP2-none", "PP2-token"])
def test_the_generators_log_probs_train_the_same(bench: Workbench, sampling: Any) -> None:
    """To 1e-5, where engine and trainer agree: without a forward for old_logprobs, and with the
    difference between the two still measured. The trainer pays for all minibatches but one."""
    objective = ObjectiveConfig(
        importance_sampling=ImportanceSamplingConfig(weight=sampling),
        entropy_coef=references.ENTROPY_COEF,
    )
    (expected, paid), (weights, free) = (
        trained(bench, replace(objective, old_logprobs=whose)) for whose in ("trainer", "generator")
    )
    assert all("time/logprob_s" in line for line in paid)
    assert not any("time/logprob_s" in line for line in free)
    for line in (*paid, *free):
        assert 0.1 * NOISE < line["logprob_diff_mean"] < 2 * NOISE
        assert line["pass_2/ppo_kl"] != 0, line
        assert abs(line["ratio_mean_first_pass"] - 1) < 1e-6, line
    assert weights.keys() == expected.keys()
    gaps = {name: (weights[name] - one).abs().max().item() for name, one in expected.items()}
    bench.figures["max_weight_difference"] = max(gaps.values())
    assert max(gaps.values()) <= 1e-5
