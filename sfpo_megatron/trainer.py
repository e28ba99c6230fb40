"""The RL loop. One train step, with what each line is backed by:

    batch    = rollouts of this step       run/engines -> rollout/controller -> engines, rewards
    prepared = advantages, minibatches, old_logprobs, ref_logprobs, K      run/learner
    results  = K fast passes, reposition, slow correction                  sfpo -> mcore/passes
    refit    = weights into the engines    run/engines -> resharding
    log, evaluate, save                    tracking, run/held_out, run/checkpoints

SPMD: every rank runs every line, in this order; rank 0 alone talks to the engines.
"""

from __future__ import annotations

from itertools import count

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.schedule import train_schedule
from sfpo_megatron.mcore.setup import build_policy
from sfpo_megatron.outputs.stopping import StopRun
from sfpo_megatron.plugins import ADVANTAGE
from sfpo_megatron.resharding.source import MegatronWeightSource
from sfpo_megatron.run.checkpoints import Checkpoints
from sfpo_megatron.run.ending import finish
from sfpo_megatron.run.engines import Engines
from sfpo_megatron.run.learner import Learner, objective_of
from sfpo_megatron.run.metrics import batch_metrics
from sfpo_megatron.run.opening import OpenedRun, open_run
from sfpo_megatron.run.saving import Stateful
from sfpo_megatron.sfpo import sfpo_step
from sfpo_megatron.tracking.memory import peak_memory
from sfpo_megatron.tracking.timers import Timers


def run(
    config: RunConfig,
    capabilities: Capabilities,
    *,
    fresh: bool = False,
    accept_data_change: bool = False,
) -> bool:
    """Train; True if the run was asked to stop before its last step. Called on every rank, after
    `mcore.setup.init_distributed`, which gave `capabilities`. `fresh`: the run in output_dir is set
    aside. `accept_data_change`: it may continue on data that has changed."""
    objective = objective_of(config)  # a user's code may fail to import: find out before any start
    ADVANTAGE.load(config.objective.advantage)
    with open_run(config, fresh=fresh, accept_data_change=accept_data_change) as opened:
        config = opened.config  # its length is in steps now; engines start meanwhile
        opened.progress(capabilities.describe())
        with doing("build"):
            schedule = train_schedule(config.train)
            policy = build_policy(config, capabilities, schedule, model_path=config.model.path)
            source = MegatronWeightSource(policy)
            learner = Learner(config, policy, objective)
        engines = opened.engines(policy, source, learner.snapshot.buffers)
        kept: dict[str, Stateful] = {
            "gate": learner.gate,
            "totals": learner.totals,
            "collapse": learner.collapse,
            "data": opened.ends.feed,
            "best": opened.ends.best,
        }
        checkpoints = Checkpoints(config, opened, policy, engines, kept)
        loop = generate if config.debug.rollout_only else train
        try:
            stopped = loop(opened, learner, engines, checkpoints)
        except StopRun as stop:  # on every rank
            checkpoints.give_up(stop)
            return True
        if not stopped:
            engines.to_trainer()
            finish(config, opened, source)
        return stopped


def train(opened: OpenedRun, learner: Learner, engines: Engines, checkpoints: Checkpoints) -> bool:
    """The loop; True if the run was asked to stop and has been saved. Collective."""
    done, alpha = checkpoints.resume(), opened.config.sfpo.alpha
    if done == 0 or engines.lacks_evaluation(done):
        engines.evaluate(step=done)
        checkpoints.evaluated(done)
    if engines.is_over(done):
        return checkpoints.after_step(done, is_last=True)
    for step in count(done + 1):
        timers = Timers(peak_memory())
        with timers("step", step=step):
            batch = engines.collect(step)
            engines.to_trainer()  # colocated engines have had the devices
            prepared = learner.prepare(step, batch, timers)
            k = prepared.num_fast
            one_pass = checkpoints.guarded(prepared.one_pass, step=step, num_passes=k + 1)
            with timers("sfpo"):
                results = sfpo_step(one_pass, learner.snapshot, num_fast_passes=k, alpha=alpha)
            learner.observe(results)
            engines.take_weights(step, timers)
        metrics = learner.metrics(prepared, results, timers, engines.metrics)
        opened.log(metrics | checkpoints.times)
        opened.show(engines.details(step, batch))
        ids, warn, save = opened.ends.feed.prompt_ids, opened.important, checkpoints.save_now
        learner.check(prepared, results, metrics, prompt_ids=ids, warn=warn, save=save)
        is_last = engines.evaluate_if_due(step)
        if (is_stopped := checkpoints.after_step(step, is_last=is_last)) or is_last:
            break
    return is_stopped


def generate(
    opened: OpenedRun, learner: Learner, engines: Engines, checkpoints: Checkpoints
) -> bool:
    """`debug.rollout_only`: the loop without an update; always False. Collective."""
    checkpoints.resume()
    engines.evaluate(step=0)
    for step in range(1, opened.config.train.steps + 1):
        batch = engines.collect(step)
        opened.log({"step": step, **batch_metrics(batch, learner.totals), **engines.metrics})
        opened.show(engines.details(step, batch))
    engines.evaluate(step=opened.config.train.steps)
    return False
