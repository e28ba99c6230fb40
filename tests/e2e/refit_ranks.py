"""Run under torchrun: train on Megatron, refit a live engine after every step, and write down what
the engine then says (rank 0) beside an export of the policy. test_trained_refit.py reads it."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from made.batches import make_batch

from sfpo_megatron.config.load import load_config
from sfpo_megatron.mcore.setup import LRSchedule, build_policy, init_distributed
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.types import Prompt, RolloutBatch


def synthetic_batch(step: int, num: int, vocab: int) -> RolloutBatch:
    """Random rollouts with random rewards: gradients for every weight."""
    generator = torch.Generator().manual_seed(step)
    prompts, responses = torch.full((num,), 4), torch.full((num,), 6)
    return make_batch(
        prompts,
        responses,
        torch.randint(0, vocab, (10 * num,), generator=generator),
        group_size=8,
        rewards=torch.rand(num, generator=generator),
        weight_version=step,
    )


def prompts(vocab: int) -> tuple[Prompt, ...]:
    """Longer than two prefix-cache blocks of 32."""
    return tuple(
        Prompt(
            id=f"p/{i}",
            text="",
            token_ids=tuple((5 * i + j * j) % (vocab - 2) + 2 for j in range(66 + i)),
            question="",
            answer="7",
        )
        for i in range(6)
    )


def main(config_file: str, num_steps: int) -> None:
    config = load_config(config_file, [])
    capabilities = init_distributed(config)  # before anything imports megatron
    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.resharding.source import MegatronWeightSource

    is_main = dist.get_rank() == 0
    client = None
    if is_main:
        from sfpo_megatron.rollout.controller import start_rollouts

        client = start_rollouts(config, model_path=config.model.path)
    out = Path(config.output_dir)
    schedule = LRSchedule(
        peak=config.train.optimizer.lr, floor=0.0, warmup_ticks=0, total_ticks=9, style="constant"
    )
    policy = build_policy(config, capabilities, schedule, model_path=config.model.path)
    source = MegatronWeightSource(policy)
    if client is not None:
        client.wait_ready(200)
    policy.control.barrier()
    refit = Refit(config, source=source, client=client.sync_client if client else None)
    snapshot = SlowSnapshot(policy.shards)
    objective = PolicyObjective.of(config)
    for step in range(1, num_steps + 1):
        num = config.train.prompts_per_step * config.train.group_size
        minibatches = cut(config, policy, synthetic_batch(step, num, policy.shape.vocab_size))
        set_old_logprobs(
            minibatches,
            compute_logprobs(policy, minibatches, temperature=config.rollout.temperature),
        )
        one_pass = partial(run_pass, policy, minibatches, objective)
        sfpo_step(one_pass, snapshot, num_fast_passes=3, alpha=0.8)
        refit.send(step)
        export_hf(
            source,
            out / f"hf_{step}",
            model_path=config.model.path,
            dtype=config.model.dtype,
            is_writer=is_main,
        )
        if client is not None:
            (out / f"greedy_{step}.json").write_text(json.dumps(greedy(client, policy, step)))
    refit.close()
    if client is not None:
        client.close()


def greedy(client: object, policy: object, step: int) -> list[object]:
    from sfpo_megatron.rollout.sampling import RolloutRequest

    request = RolloutRequest(
        id=f"greedy/{step}",
        step=step,
        prompts=prompts(policy.shape.vocab_size),  # type: ignore[attr-defined]
        num_samples=1,
        temperature=0.0,
        top_p=1.0,
        max_response_tokens=16,
    )
    client.submit(request)  # type: ignore[attr-defined]
    rollouts = client.collect(request.id)  # type: ignore[attr-defined]
    assert {r.weight_version for r in rollouts} == {step}
    return [[r.prompt_token_ids, r.token_ids, r.generator_logprobs] for r in rollouts]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
