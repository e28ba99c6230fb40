"""The warm start: next-token loss on `prompt + answer`, on the Megatron stack of the RL run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist

from sfpo_megatron.batching import build_minibatches
from sfpo_megatron.checkpoints.identity import retire_run
from sfpo_megatron.checkpoints.store import CheckpointError, store_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.sft import SFTExample, sft_examples
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.mcore.batches import batch_layout
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.passes import on_device, run_pass
from sfpo_megatron.mcore.setup import LRSchedule, build_policy
from sfpo_megatron.objectives.objective import NextTokenObjective
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.source import MegatronWeightSource
from sfpo_megatron.run.continuing import prepare_output
from sfpo_megatron.run.saved_rollouts import share
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.tracking.tracker import NoTracker, Tracker
from sfpo_megatron.types import RolloutBatch


def run(config: RunConfig, capabilities: Capabilities, *, fresh: bool = False) -> None:
    """Train `sft.num_steps` optimizer steps and export to output_dir/hf. Every rank calls it, after
    `mcore.setup.init_distributed`. `fresh`: the run in output_dir is set aside."""
    is_main = dist.get_rank() == 0
    if is_main:
        _make_room(config, fresh)
    sft = config.sft
    schedule = LRSchedule(
        peak=sft.lr,
        floor=0.1 * sft.lr,
        warmup_ticks=sft.num_steps // 10,
        total_ticks=sft.num_steps,
        style="cosine",
    )
    policy = build_policy(config, capabilities, schedule, model_path=config.model.path)
    examples: Iterator[SFTExample] = iter(())
    tracker: Tracker | NoTracker = NoTracker()
    if is_main:
        prepare_output(config)
        examples = sft_examples(config, load_tokenizer(config.model.path))
        tracker = Tracker(config, num_steps=sft.num_steps)
    layout, objective = batch_layout(config, policy, 1), NextTokenObjective()
    with tracker:
        for step in range(1, sft.num_steps + 1):
            timers = Timers()
            with timers("step"):
                chosen = list(islice(examples, sft.examples_per_step))
                batch = share(policy.control, as_batch(chosen) if is_main else None)
                advantages = torch.zeros(batch.num_rollouts)
                minibatches = on_device(policy, build_minibatches(batch, advantages, layout))
                policy.scheduler.step(increment=1)
                (result,) = run_pass(policy, minibatches, objective).minibatches
            if step % 10 == 0 or step in (1, sft.num_steps):
                metrics = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm}
                tracker.log(metrics | {"entropy": result.entropy} | timers.take())
        export_hf(
            MegatronWeightSource(policy),
            RunDirectory.of(config.output_dir).hf,
            model_path=config.model.path,
            dtype=config.model.dtype,
            is_writer=is_main,
        )


def _make_room(config: RunConfig, fresh: bool) -> None:
    """Set the run in output_dir aside, or refuse to write the warm start's metrics in between its
    own: it would continue on top of them."""
    directory, store = RunDirectory.of(config.output_dir), store_of(config)
    if fresh:
        retire_run(directory, store)
    elif steps := store.steps():
        raise CheckpointError(
            f"output_dir: found the checkpoints of a run in {directory.path} (the last of step "
            f"{max(steps)}), expected a directory without; choose another for the warm start, or "
            "set the run aside with --fresh"
        )


def as_batch(examples: list[SFTExample]) -> RolloutBatch:
    """Examples in the layout of rollouts: the answer stands where a response would."""
    lengths = [(len(prompt), len(answer)) for prompt, answer in examples]
    num_answer_tokens = sum(answer for _, answer in lengths)
    return RolloutBatch(
        group_size=1,
        prompt_lengths=torch.tensor([prompt for prompt, _ in lengths]),
        response_lengths=torch.tensor([answer for _, answer in lengths]),
        token_ids=torch.tensor([t for prompt, answer in examples for t in (*prompt, *answer)]),
        generator_logprobs=torch.zeros(num_answer_tokens),
        response_mask=torch.ones(num_answer_tokens, dtype=torch.bool),
        rewards=torch.zeros(len(examples)),
        correct=torch.zeros(len(examples), dtype=torch.bool),
        finished=torch.ones(len(examples), dtype=torch.bool),
        weight_version=0,
    )
