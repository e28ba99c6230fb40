"""The warm start: next-token loss on what the rows of data.train teach, on the RL run's stack.

    batch    = examples of this step            run/warm_start -> data/sft
    result   = one pass, one optimizer step     mcore/passes
    log, held-out loss, save                    tracking, run/checkpoints

The loss is the mean over all learned tokens of the batch, whatever its split over microbatches and
ranks. SPMD: every rank runs every line, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from sfpo_megatron.batching import build_minibatches
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.mcore.batches import batch_layout
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.passes import compute_logprobs, on_device, run_pass
from sfpo_megatron.mcore.schedule import sft_schedule
from sfpo_megatron.mcore.setup import Policy, build_policy
from sfpo_megatron.objectives.objective import NextTokenObjective
from sfpo_megatron.outputs.stopping import StopRun
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.source import MegatronWeightSource
from sfpo_megatron.run.checkpoints import Checkpoints
from sfpo_megatron.run.collapse import LostSteps, RunCollapsed, loss_scale_of
from sfpo_megatron.run.engines import NoEngines
from sfpo_megatron.run.saving import Stateful
from sfpo_megatron.run.warm_start import WarmStart, open_warm_start
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.types import Minibatch, RolloutBatch


def run(
    config: RunConfig,
    capabilities: Capabilities,
    *,
    fresh: bool = False,
    accept_data_change: bool = False,
) -> bool:
    """Warm-start and export to output_dir/hf; True if the run was asked to stop before its last
    step, and saved. Called on every rank, after `mcore.setup.init_distributed`. `fresh`: the run in
    output_dir is set aside. `accept_data_change`: it may continue on data that has changed."""
    warm = open_warm_start(config, fresh=fresh, accept_data_change=accept_data_change)
    with warm as start:
        opened, config = start.opened, start.opened.config
        with doing("build"):
            path = config.model.path
            policy = build_policy(config, capabilities, sft_schedule(config.sft), model_path=path)
        teacher = Teacher(config, policy)
        kept: dict[str, Stateful] = {
            "data": opened.ends.feed,
            "best": opened.ends.best,
            "collapse": teacher.lost,
        }
        checkpoints = Checkpoints(config, opened, policy, NoEngines(), kept, kind="sft")
        try:
            if learn(start, teacher, checkpoints):
                return True
        except StopRun as stop:  # on every rank
            checkpoints.give_up(stop)
            return True
        with doing("export"):
            export_hf(
                MegatronWeightSource(policy),
                opened.directory.hf,
                model_path=path,
                dtype=config.model.dtype,
                is_writer=opened.is_main,
            )
        opened.important(f"policy: {opened.directory.hf}")
    return False


def learn(start: WarmStart, teacher: Teacher, checkpoints: Checkpoints) -> bool:
    """The loop; True if the run was asked to stop and has been saved. Collective."""
    opened, sft = start.opened, start.opened.config.sft
    first = checkpoints.resume() + 1
    if first == 1:
        measure(start, teacher, step=0)
    for step in range(first, sft.steps + 1):
        timers = Timers()
        with timers("step", step=step):
            minibatches = teacher.cut(start.next_batch(step))
            one_step = checkpoints.guarded(
                partial(teacher.learn, minibatches), step=step, num_passes=1
            )
            metrics = one_step()
        opened.log({"step": step, **metrics, **timers.take(), **checkpoints.times})
        teacher.check(step, metrics, save=checkpoints.save_now)
        if step == sft.steps or (sft.eval_every and step % sft.eval_every == 0):
            measure(start, teacher, step=step)
        if checkpoints.after_step(step, is_last=step == sft.steps):
            return True
    return False


def measure(start: WarmStart, teacher: Teacher, *, step: int) -> None:
    """The loss on what is held out into the metrics, and the best one so far; nothing where nothing
    is held out. Collective."""
    if not start.held_out:
        return
    timers = Timers()
    with timers("evaluate"):
        loss, num_tokens = teacher.loss_of(start.held_out)
    found = {"eval/loss": loss, "eval/num_tokens": num_tokens}
    start.opened.log({"step": step, **found, **timers.take()})
    start.opened.ends.best.observe(step, -loss)  # the higher the better


class Teacher:
    """Learns from batches, and measures without learning. Methods are collective."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self._config = config
        self._policy = policy
        self.lost = LostSteps(config.sft.stop_after_skipped_steps, section="sft")
        self._layout = batch_layout(config, policy, 1)
        self._objective = NextTokenObjective()

    def cut(self, batch: RolloutBatch) -> list[Minibatch]:
        """This rank's part of a batch, where its model is. Not collective."""
        advantages = torch.zeros(batch.num_rollouts)
        return on_device(self._policy, build_minibatches(batch, advantages, self._layout))

    def learn(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """One tick of the schedule and one optimizer step; its metrics."""
        self._policy.scheduler.step(increment=1)
        (result,) = run_pass(self._policy, minibatches, self._objective).minibatches
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "entropy": result.entropy,
            "num_tokens": result.num_tokens,
            "num_skipped_steps": int(result.skipped),
            "lr": self._policy.optimizer.param_groups[0]["lr"],
        }

    def check(
        self, step: int, metrics: Mapping[str, float], *, save: Callable[[int], None]
    ) -> None:
        """Look by the step's `metrics` whether anything is learned still. RunCollapsed on every
        rank, after a `save` of the step."""
        said = self.lost.observe(
            step,
            loss=metrics["loss"],
            num_skipped=int(metrics["num_skipped_steps"]),
            num_steps=1,
            loss_scale=loss_scale_of(self._config, self._policy),
        )
        if said is not None:
            save(step)
            raise RunCollapsed.of(self._config, said)

    def loss_of(self, batches: tuple[RolloutBatch, ...]) -> tuple[float, int]:
        """Mean over all learned tokens of all batches, and their number. No weight changes."""
        found = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            minibatches = self.cut(batch)
            logprobs = compute_logprobs(
                self._policy, minibatches, temperature=self._objective.temperature
            )
            if self._policy.layout.tensor_rank != 0:
                continue  # tensor-parallel ranks hold the same
            for minibatch, values in zip(minibatches, logprobs, strict=True):
                # Log-probs are on the last stage alone: the lists are empty elsewhere.
                for microbatch, value in zip(minibatch.microbatches, values, strict=False):
                    learned = value[microbatch.loss_mask].double().cpu()
                    found += torch.tensor([-learned.sum(), learned.numel()], dtype=torch.float64)
        total, count = self._policy.control.sum(found).tolist()
        return total / count, int(count)
