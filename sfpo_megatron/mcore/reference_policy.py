"""The frozen reference policy: its weights in host memory, swapped in for a log-prob pass.

No second model on the device, and one host copy a rank: the exchange puts the policy's own weights
where the reference's were, tensor by tensor. What is exchanged are model params, never main params;
both ways are copies, so the policy's bits come back, also where main params share their storage
(fp32 params under the DistributedOptimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sfpo_megatron.config.objective import KLConfig
from sfpo_megatron.mcore.model import unwrapped
from sfpo_megatron.mcore.passes import compute_logprobs
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.objectives.kl import kl_estimate
from sfpo_megatron.objectives.sequences import Sequences
from sfpo_megatron.types import Minibatch


class ReferencePolicy:
    """The weights that `policy` has at construction, kept. Collective throughout."""

    def __init__(self, policy: Policy) -> None:
        policy.shards.params_ready()
        self._policy = policy
        self._host = [tensor.to("cpu", copy=True) for tensor in _weights(policy.chunks)]

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank: its part of the model in the model's dtype."""
        return sum(tensor.nbytes for tensor in self._host)

    def set_ref_logprobs(self, minibatches: Sequence[Minibatch], *, temperature: float) -> None:
        """Fix `ref_logprobs` of every microbatch (on the ranks of the last pipeline stage)."""
        with self.swapped_in():
            values = compute_logprobs(self._policy, minibatches, temperature=temperature)
        for minibatch, found in zip(minibatches, values, strict=True):
            for microbatch, logprobs in zip(minibatch.microbatches, found, strict=False):
                microbatch.ref_logprobs = logprobs

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the reference's weights inside; only forwards without gradient may run."""
        # A gather that is due would spread reference weights later on as if they were the policy's.
        self._policy.shards.params_ready()
        self._exchange()
        try:
            yield
        finally:
            # Nothing is due, so this gathers nothing; it waits for what a schedule may have started
            # (megatron.ddp.align_param_gather), which would write over the restored weights.
            self._policy.shards.params_ready()
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the live weights and those on the host; twice is none."""
        for kept, live in zip(self._host, _weights(self._policy.chunks), strict=True):
            own = live.to("cpu", copy=True)
            live.copy_(kept)
            kept.copy_(own)


def _weights(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """What a checkpoint of the model holds: params and persistent buffers (a router's expert bias),
    each storage once (tied embeddings)."""
    seen: set[int] = set()
    for chunk in chunks:
        for name, tensor in unwrapped(chunk).state_dict().items():
            if name.endswith("_extra_state"):
                continue  # TransformerEngine's, whose size changes after the first FP8 forward
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield tensor


@torch.no_grad()
def rollout_kl(
    policy: Policy, minibatches: Sequence[Minibatch], num_rollouts: int, config: KLConfig
) -> Tensor:
    """[N] float64: the KL estimates of each rollout's tokens between `old_logprobs` and
    `ref_logprobs`, added up; 0 for a rollout that is masked out. The same on every rank.
    Collective."""
    total = torch.zeros(num_rollouts, dtype=torch.float64)
    for microbatch in (m for minibatch in minibatches for m in minibatch.microbatches):
        old, ref = microbatch.old_logprobs, microbatch.ref_logprobs
        if old is None or ref is None or policy.layout.tensor_rank != 0:
            continue  # log-probs live on the last stage; tensor-parallel ranks hold the same
        estimate = kl_estimate(old, ref, microbatch.loss_mask, config)
        sums = Sequences(microbatch.cu_seqlens, microbatch.loss_mask).sum(estimate)
        rollouts = microbatch.rollouts.cpu()
        real = rollouts >= 0
        total[rollouts[real]] = sums.double().cpu()[real]
    return policy.control.sum(total)
