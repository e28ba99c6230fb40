"""Rollout batches that several tests train on; what a test does not say is as plain as can be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sfpo_megatron.types import RolloutBatch


def make_batch(
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    token_ids: Tensor | None = None,
    *,
    generator_logprobs: Tensor | float = 0.0,
    response_mask: Tensor | None = None,
    rewards: Tensor | None = None,
    correct: Tensor | None = None,
    finished: Tensor | None = None,
    group_size: int = 1,
    weight_version: int = 0,
) -> RolloutBatch:
    """Lengths [N]; token_ids [sum(P + R)], by default 1, 2, 3 ... (0 is padding, and each is told
    apart). One number for generator_logprobs is every token's. By default every response token is
    trained on, every reward is 0 and every response ended by itself."""
    num, num_response = prompt_lengths.numel(), int(response_lengths.sum())
    if token_ids is None:
        token_ids = torch.arange(1, int(prompt_lengths.sum()) + num_response + 1)
    if not isinstance(generator_logprobs, Tensor):
        generator_logprobs = torch.full((num_response,), generator_logprobs)
    rewards = torch.zeros(num) if rewards is None else rewards
    everything = torch.ones(num_response, dtype=torch.bool)
    return RolloutBatch(
        group_size=group_size,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        token_ids=token_ids,
        generator_logprobs=generator_logprobs,
        response_mask=everything if response_mask is None else response_mask,
        rewards=rewards,
        correct=rewards > 0 if correct is None else correct,
        finished=torch.ones(num, dtype=torch.bool) if finished is None else finished,
        weight_version=weight_version,
    )


def with_random_mask(batch: RolloutBatch, seed: int, *, share: float = 0.6) -> RolloutBatch:
    """`batch` with about `share` of its response tokens trained on, in runs of any length; of the
    first rollout none is, of the second only the last."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch.response_mask.shape, generator=random) < share
    first, second = batch.response_lengths[:2].tolist()
    mask[: first + second] = False
    mask[first + second - 1] = second > 0
    return replace(batch, response_mask=mask)
