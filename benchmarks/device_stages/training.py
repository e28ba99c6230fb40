"""Stage `training`: SFPO steps in bf16 equal those of a plain trainer. Stage `te` calls it too.

The plain trainer (tests/dist/plain_sfpo.py) shares no code with ours but Megatron's model, which it
calls a sequence at a time without a schedule, DDP or Megatron's optimizer, under Megatron's local
layers: fp32 weights, of which each forward takes bf16 copies.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.device_stages import tiny
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from sfpo_megatron.config.tree import RunConfig
    from sfpo_megatron.mcore.passes import PassResult
    from sfpo_megatron.mcore.setup import Policy

NUM_STEPS = 2
LOSS_BOUND, NORM_BOUND = 5e-3, 0.05
"""Absolute, and relative: several times what one rounding to bf16 more or less makes."""


def run(
    device: torch.device,
    impl: Literal["te", "local"] = "local",
    *,
    optimizer: Mapping[str, Any] | None = None,
    then: Callable[[RunConfig, Policy], dict[str, Any]] = lambda config, policy: {},
) -> dict[str, Any]:
    """Losses and gradient norms of every minibatch, ours against the plain trainer's; and what
    `then` finds of our policy once it is trained."""
    from sfpo_megatron.mcore import setup

    with tiny.alone(device) as folder:
        config = tiny.run_config(folder, impl, "bfloat16", optimizer)
        policy, capabilities = tiny.build(config)
        if device.type == "cuda":
            assert "sfpo_megatron.mcore.cpu" not in sys.modules, "the CPU bridge is imported"
            assert dist.get_backend() == "nccl", dist.get_backend()
        plain = PlainModel(config, policy, device)
        ours = train(config, policy)
        theirs = train_plain(plain, config, device)
        more = then(config, policy)
        setup.shut_down()
    losses = (ours[:, 0] - theirs[:, 0]).abs()
    norms = (ours[:, 1] / theirs[:, 1] - 1).abs()
    figures = {
        "layers": capabilities.layers,
        "adam": capabilities.adam,
        "optimizer_steps": len(ours),
        "loss_difference": float(losses.max()),
        "grad_norm_difference": float(norms.max()),
        **more,
    }
    assert figures["loss_difference"] < LOSS_BOUND, figures
    assert figures["grad_norm_difference"] < NORM_BOUND, figures
    return figures


def one_pass_of(config: RunConfig, policy: Policy, step: int) -> Callable[[], PassResult]:
    """One pass over the step's batch."""
    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.objectives.objective import PolicyObjective

    minibatches = cut(config, policy, tiny.batch(step))
    set_old_logprobs(minibatches, compute_logprobs(policy, minibatches, temperature=1.0))
    return partial(run_pass, policy, minibatches, PolicyObjective.of(config))


def train(config: RunConfig, policy: Policy) -> Tensor:
    """(loss, gradient norm) of every optimizer step."""
    snapshot, history = SlowSnapshot(policy.shards), []
    for step in range(NUM_STEPS):
        one_pass = one_pass_of(config, policy, step)
        results = sfpo_step(one_pass, snapshot, num_fast_passes=tiny.K, alpha=tiny.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
        history += [[m.loss, m.grad_norm] for result in results for m in result.minibatches]
    return torch.tensor(history, dtype=torch.float64)


def train_plain(model: PlainModel, config: RunConfig, device: torch.device) -> Tensor:
    """The same of the plain trainer."""
    import plain_sfpo

    section = config.train.optimizer
    settings = plain_sfpo.Settings(
        k=tiny.K,
        alpha=tiny.ALPHA,
        minibatches=config.train.minibatches_per_step,
        group_size=tiny.GROUP,
        lr=section.lr,
        weight_decay=section.weight_decay,
        clip_grad=section.clip_grad,
        clip=config.objective.clip_low,
        entropy_coef=config.objective.entropy_coef,
        eps=section.eps,
    )
    names = ("prompt_lengths", "response_lengths", "token_ids", "rewards")
    batches = [
        {name: getattr(tiny.batch(step), name).to(device) for name in names}
        for step in range(NUM_STEPS)
    ]
    history, _ = plain_sfpo.train(model, batches, settings)
    flat = [minibatch for step in history for of_pass in step for minibatch in of_pass]
    return torch.tensor(flat, dtype=torch.float64)


def packed_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Megatron's description of a pack of sequences."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


class PlainModel(torch.nn.Module):
    """Megatron's model under its local layers, called as transformers' are; its parameters are the
    fp32 weights."""

    def __init__(self, config: RunConfig, policy: Policy, device: torch.device) -> None:
        from sfpo_megatron.mcore.model import build_chunks
        from sfpo_megatron.mcore.settings import transformer_config
        from sfpo_megatron.mcore.weights import load_hf_weights

        super().__init__()
        local = dataclasses.replace(policy.capabilities, layers="local")
        shape = policy.shape
        (model,) = build_chunks(shape, transformer_config(shape, config, local), local)
        load_hf_weights([model], shape, config.model.path, tensor=(0, 1), expert_tensor=(0, 1))
        self._called = [model.to(device)]  # in a list: its weights are not this module's
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(p.detach().float()) for _, p in model.named_parameters()
        )

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        length = tokens.shape[1]
        packed = packed_params([length], tokens.device)
        rounded = {n: w.bfloat16() for n, w in zip(self.names, self.weights, strict=True)}
        positions = torch.arange(length, device=tokens.device)[None]
        logits = torch.func.functional_call(
            self._called[0], rounded, (tokens, positions, None), {"packed_seq_params": packed}
        )
        return SimpleNamespace(logits=logits.float())
