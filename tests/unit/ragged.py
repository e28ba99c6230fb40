"""A ragged rollout batch, cut into packs over ranks, for the tests of the objectives.

Token i of the batch has id i + 1 (0 is padding), so that `flat[microbatch.labels]` lays a value a
token out onto any pack, and the gradient of `flat` is the sum over all packs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from made.batches import make_batch
from torch import Tensor

from sfpo_megatron.batching import BatchLayout, build_minibatches
from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.advantage import in_loss
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.plugins import LOSS
from sfpo_megatron.types import Minibatch, RolloutBatch

GROUP_SIZE, MAX_RESPONSE = 4, 12


@dataclass(kw_only=True)
class Ragged:
    """16 rollouts with their log-probs; `new` and `entropy` are leaves."""

    batch: RolloutBatch
    advantages: Tensor  # [N]
    old: Tensor  # [tokens + 1] by token id
    new: Tensor  # [tokens + 1]
    entropy: Tensor  # [tokens + 1]

    def responses(self) -> Iterator[tuple[int, slice]]:
        """(rollout, its response's slice of the flat tensors)."""
        end = 1
        lengths = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        for index, (prompt, response) in enumerate(lengths):
            start = end + int(prompt)
            end = start + int(response)
            yield index, slice(start, end)


def ragged(seed: int, *, equal_lengths: int | None = None, spread: float = 0.5) -> Ragged:
    """Ratios reach far beyond the usual clips; one response has one token, one group one reward."""
    random = torch.Generator().manual_seed(seed)
    num = 4 * GROUP_SIZE
    prompts = torch.randint(1, 6, (num,), generator=random)
    responses = torch.randint(1, MAX_RESPONSE + 1, (num,), generator=random)
    responses[2] = 1
    if equal_lengths is not None:
        responses[:] = equal_lengths
    rewards = torch.rand(num, generator=random)
    rewards[4:8] = 0.3
    size = int((prompts + responses).sum()) + 1
    old = -3 * torch.rand(size, generator=random)
    new = old + spread * torch.randn(size, generator=random)
    generator_logprobs = old + 0.4 * torch.randn(size, generator=random)
    found = Ragged(
        batch=make_batch(
            prompts,
            responses,
            group_size=GROUP_SIZE,
            rewards=rewards,
            correct=rewards > 0.5,
            finished=torch.rand(num, generator=random) > 0.3,
        ),
        advantages=torch.randn(num, generator=random),
        old=old,
        new=new,
        entropy=torch.rand(size, generator=random),
    )
    in_response = torch.zeros(size, dtype=torch.bool)
    for _, span in found.responses():
        in_response[span] = True
    found.new[~in_response] = 60.0  # what no mask covers may hold anything finite
    found.batch = replace(found.batch, generator_logprobs=generator_logprobs[in_response])
    found.new.requires_grad_()
    found.entropy.requires_grad_()
    return found


def objective_of(config: ObjectiveConfig) -> PolicyObjective:
    return PolicyObjective(
        temperature=1.0,
        config=config,
        loss=LOSS.load(config.loss),
        max_response_tokens=MAX_RESPONSE,
    )


def cut(data: Ragged, config: ObjectiveConfig, *, data_size: int = 2) -> list[Minibatch]:
    """The one minibatch, a part a rank, in packs of about three rollouts."""
    parts = []
    for rank in range(data_size):
        layout = BatchLayout(
            minibatches=1, data_rank=rank, data_size=data_size, max_tokens=40, pad_multiple=4
        )
        chosen = in_loss(data.batch, config)
        parts += build_minibatches(data.batch, data.advantages, layout, in_loss=chosen)
    for microbatch in (m for part in parts for m in part.microbatches):
        microbatch.old_logprobs = data.old[microbatch.labels]
    return parts


def run(
    data: Ragged, config: ObjectiveConfig, *, data_size: int = 2
) -> tuple[Tensor, dict[str, float]]:
    """(loss of the minibatch [] differentiable, statistic sums and maxima) over all packs of all
    ranks."""
    objective = objective_of(config)
    loss, stats = torch.zeros(()), defaultdict[str, Tensor](lambda: torch.zeros(()))
    parts = cut(data, config, data_size=data_size)
    for microbatch in (m for part in parts for m in part.microbatches):
        labels = microbatch.labels
        terms = objective(data.new[labels], data.entropy[labels], microbatch)
        assert not any(v.requires_grad for v in (*terms.sums.values(), *terms.maxima.values()))
        loss = loss + terms.loss
        for name, value in terms.sums.items():
            stats[name] = stats[name] + value
        for name, value in terms.maxima.items():
            stats[name] = torch.maximum(stats[name], value)
    (normalizer,) = {objective.normalizer(part) for part in parts}
    return loss / normalizer, {name: value.item() for name, value in stats.items()}
