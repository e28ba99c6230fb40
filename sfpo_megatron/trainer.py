"""The RL loop. One train step, with what each line is backed by:

    batch       = rollouts of this step       rollout/controller -> engines -> rewards; broadcast
    advantages  = group-relative rewards      objectives/advantage
    minibatches = the split, made once        batching
    old_logprobs, fixed before any update     mcore/passes.compute_logprobs
    ref_logprobs, where there is a KL term    mcore/reference
    sfpo_step   = K fast passes, reposition, slow correction      sfpo.py -> mcore/passes.run_pass
    refit       = weights into the engines    resharding; colocated: the devices too (turns)
    log, evaluate, save                       run_io, evaluate, run_state

SPMD: every rank runs every line, in this order; rank 0 alone talks to the engines.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfpo_megatron.batching import (
    BatchLayout,
    build_minibatches,
    pad_multiple_of,
    set_advantages,
)
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.stopping import OutOfTime
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.offload import Offload
from sfpo_megatron.mcore.passes import (
    PassResult,
    compute_logprobs,
    on_device,
    run_pass,
    set_old_logprobs,
)
from sfpo_megatron.mcore.reference_policy import ReferencePolicy, rollout_kl
from sfpo_megatron.mcore.setup import LRSchedule, Policy, build_policy
from sfpo_megatron.objectives.advantage import advantages_of, in_loss, shaped_rewards
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.plugins import ADVANTAGE, LOSS
from sfpo_megatron.resharding.source import MegatronWeightSource
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run.checkpoints import Checkpoints
from sfpo_megatron.run.engines import RunIO, open_run
from sfpo_megatron.run.metrics import (
    Totals,
    batch_metrics,
    logprob_difference,
    pass_metrics,
    split_metrics,
)
from sfpo_megatron.sfpo import EntropyGate, SlowSnapshot, Snapshot, sfpo_step
from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.moments import MomentSnapshot
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.types import Minibatch, RolloutBatch

if TYPE_CHECKING:
    from sfpo_megatron.mcore.control import ControlGroup


def run(config: RunConfig, capabilities: Capabilities) -> bool:
    """Train; True if the run was asked to stop before its last step. Called on every rank, after
    `mcore.setup.init_distributed`, which gave `capabilities`: what Megatron finds missing has to be
    settled before it is first imported."""
    LOSS.load(config.objective.loss)  # a user's may not import: find out before anything starts
    ADVANTAGE.load(config.objective.advantage)
    with open_run(config) as io:  # engines start while Megatron sets up
        io.progress(capabilities.describe())
        lr = config.train.optimizer
        schedule = LRSchedule(
            peak=lr.lr,
            floor=0.0,
            warmup_ticks=lr.lr_warmup_steps,
            total_ticks=config.train.num_steps,
            style="constant",
        )
        policy = build_policy(config, capabilities, schedule, model_path=config.model.path)
        source = MegatronWeightSource(policy)
        io.connect(policy.control, source)
        try:
            stopped = _train(config, policy, io)
        except OutOfTime:  # on every rank: the last checkpoint is what there is
            return True
        if not stopped:
            io.finish(source)
        return stopped


def _train(config: RunConfig, policy: Policy, io: RunIO) -> bool:
    kl = config.objective.kl
    kl_in_reward = kl.coef > 0 and kl.where == "reward"
    # With one minibatch a pass, the first pass's own forward is under the weights that generated:
    # it yields old_logprobs, and no forward is paid for them.
    first_pass_is_old = config.train.minibatches_per_step == 1 and not kl_in_reward
    objective = PolicyObjective.of(config, first_pass_is_old=first_pass_is_old)
    reference = ReferencePolicy(policy) if kl.coef > 0 else None
    snapshot = slow_snapshot(config, policy)
    io.share_devices(Offload(policy, snapshot.buffers))
    gate = EntropyGate(
        window=config.sfpo.entropy_window,
        zscore_threshold=config.sfpo.entropy_zscore_threshold,
        two_sided=config.sfpo.trigger == "two_sided",
        latch=config.sfpo.latch,
        stop_step=config.sfpo.stop_step,
    )
    totals = Totals()
    checkpoints = Checkpoints(config, policy, io, gate, totals)
    first = checkpoints.resume() + 1  # after the reference policy has taken the initial weights
    if first == 1:
        io.evaluate(step=0)
    for step in range(first, config.train.num_steps + 1):
        timers = Timers()
        with timers("step"):
            batch = _collect(config, io, checkpoints, step)
            if batch is None:
                return True
            if config.debug.rollout_only:
                io.log({"step": step, **batch_metrics(batch, totals), **io.rollout_metrics})
                if step == config.train.num_steps:
                    io.evaluate(step=step)
                continue
            io.to_trainer()  # colocated engines have had the devices
            minibatches = cut(config, policy, batch)
            if not first_pass_is_old:
                with timers("logprob"):
                    set_old_logprobs(minibatches, compute_logprobs(policy, minibatches))
            if reference is not None:
                with timers("reference"):
                    reference.set_ref_logprobs(minibatches)
            if kl_in_reward:
                penalty = rollout_kl(policy, minibatches, batch.num_rollouts)
                set_advantages(minibatches, advantages(config, batch, penalty))

            num_fast = fast_passes(config, policy.control, gate, step)
            policy.control.agree(step=step, num_fast=num_fast, minibatches=len(minibatches))
            policy.scheduler.step(increment=1)  # one tick a rollout batch, whatever K is
            with timers("sfpo"):
                one_pass = partial(_timed_pass, timers, policy, minibatches, objective)
                results = sfpo_step(
                    checkpoints.guarded(one_pass, num_passes=num_fast + 1),
                    snapshot,
                    num_fast_passes=num_fast,
                    alpha=config.sfpo.alpha,
                )
            if results[-1].num_tokens > 0:
                gate.observe(results[-1].mean(lambda m: m.entropy))
            with timers("wait"):
                io.wait_generated()
            with timers("refit"):
                io.refit(weight_version=step)
        metrics = {"step": step, **batch_metrics(batch, totals), **pass_metrics(results, totals)}
        mismatch = logprob_difference(policy, minibatches)
        if first_pass_is_old:  # to old_logprobs it would be 0 by construction
            metrics["ppo_kl_first_pass"] = mismatch["generator_kl"]
        metrics |= split_metrics(minibatches) | mismatch | io.rollout_metrics | _phase_times(timers)
        metrics |= {
            "sfpo_active": num_fast > 0,
            "weight_version": step,
            "lr": policy.optimizer.param_groups[0]["lr"],
        }
        io.log(metrics | checkpoints.times)
        if step == config.train.num_steps or (config.eval.every and step % config.eval.every == 0):
            io.evaluate(step=step)
        if checkpoints.after_step(step):
            return True
    return False


def _collect(
    config: RunConfig, io: RunIO, checkpoints: Checkpoints, step: int
) -> RolloutBatch | None:
    """The step's rollouts; None if the run ends before it, saved: asked to stop, or the engines are
    lost for good. Collective."""
    try:
        batch = io.collect(step)
    except FleetLost as error:  # on every rank
        if not config.saves_state:
            raise
        checkpoints.give_up(step, str(error))
        return None
    if batch is None:
        checkpoints.give_up(step)
    return batch


def slow_snapshot(config: RunConfig, policy: Policy) -> Snapshot:
    """As `sfpo.snapshot` and `sfpo.moments` ask for."""
    on_host = config.sfpo.snapshot == "host"
    snapshot = HostSnapshot(policy.shards) if on_host else SlowSnapshot(policy.shards)
    if config.sfpo.moments == "keep":
        return snapshot
    return MomentSnapshot(snapshot, policy.shards, mode=config.sfpo.moments)


def fast_passes(config: RunConfig, control: ControlGroup, gate: EntropyGate, step: int) -> int:
    """K of this step. Rank 0's gate decides for all: a rank that branches alone hangs the rest.
    Collective."""
    mine = config.sfpo.num_fast_passes if gate.is_open(step) else 0
    return int(control.broadcast_json(mine))


def _timed_pass(timers: Timers, *arguments: Any) -> PassResult:
    with timers("passes"):
        return run_pass(*arguments)


def _phase_times(timers: Timers) -> dict[str, float]:
    """Seconds by phase; what `sfpo_step` took beyond its passes is snapshot and reposition."""
    times = timers.take()
    times["time/reposition_s"] = times.pop("time/sfpo_s") - times["time/passes_s"]
    return times


def advantages(config: RunConfig, batch: RolloutBatch, kl: Tensor | None = None) -> Tensor:
    """[N], of the rewards as the objective shapes them; `kl`: [N] of each rollout."""
    limit = config.rollout.max_response_tokens
    rewards = shaped_rewards(batch, limit, config.objective, kl)
    return advantages_of(rewards, batch.group_size, config.objective)


def cut(config: RunConfig, policy: Policy, batch: RolloutBatch) -> list[Minibatch]:
    """This rank's minibatches."""
    layout = batch_layout(config, policy, config.train.minibatches_per_step)
    chosen = in_loss(batch, config.objective)
    minibatches = build_minibatches(batch, advantages(config, batch), layout, in_loss=chosen)
    return on_device(policy, minibatches)


def batch_layout(config: RunConfig, policy: Policy, num_minibatches: int) -> BatchLayout:
    """How this rank's part of a batch is cut."""
    parallel, layout = config.parallel, policy.layout
    return BatchLayout(
        minibatches=num_minibatches,
        data_rank=layout.data_rank,
        data_size=layout.data_size,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
        max_tokens=config.train.max_tokens_per_microbatch,
        microbatch_size=config.train.microbatch_size,
        pad_multiple=pad_multiple_of(config),
        microbatch_multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
        equal_lengths=parallel.virtual_pipeline is not None,
        attention_break_even=policy.shape.attention_break_even,
    )
