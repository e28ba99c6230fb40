"""The token that generator and trainer are farthest apart at, over every kind of rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import references
import torch
from harness import DP2, PP2, TP2, on_ranks

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(PP2, TP2, DP2)
def test_the_planted_token_is_found(bench: Workbench) -> None:
    """In the first, a middle and the last rollout; every rank hears of it. The generator's
    log-probs are the trainer's own but for a ripple of up to 0.1 and one token 3 nats off."""
    from made.batches import make_batch

    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.passes import compute_logprobs, set_old_logprobs
    from sfpo_megatron.run.agreement import farthest

    policy = bench.policy()
    config = bench.config_of(policy)
    saved = references.load_batch(bench.directory, 0)
    batch = make_batch(group_size=references.GROUP_SIZE, **saved)
    minibatches = cut(config, policy, batch)
    old = compute_logprobs(policy, minibatches, temperature=1.0)
    set_old_logprobs(minibatches, old)
    for row in (0, batch.num_rollouts // 2, batch.num_rollouts - 1):
        position = int(batch.response_lengths[row]) - 1
        for microbatch in (m for part in minibatches for m in part.microbatches):
            if microbatch.old_logprobs is None:
                continue
            ripple = 0.1 * torch.sin(torch.arange(microbatch.labels.numel()))
            microbatch.generator_logprobs = microbatch.old_logprobs + ripple
            bounds = microbatch.cu_seqlens.tolist()
            for of_row, start in zip(microbatch.rollouts.tolist(), bounds, strict=False):
                if of_row == row:
                    at = start + int(batch.prompt_lengths[row]) - 1 + position
                    assert microbatch.loss_mask[at]
                    microbatch.generator_logprobs[at] = microbatch.old_logprobs[at] - 3
        found = farthest(policy, batch, minibatches)
        assert found is not None and (found.row, found.position) == (row, position)
        assert abs(found.trainer - found.generator - 3) < 1e-5
        assert policy.control.all_gather_json(found.row) == [row] * policy.control.size
