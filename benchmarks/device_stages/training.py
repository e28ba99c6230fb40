"""Stages `training` and `te`: SFPO steps in bf16 equal those of a plain trainer.

The plain trainer (tests/dist/plain_sfpo.py) shares no code with ours but Megatron's model, which it
calls a sequence at a time without a schedule, DDP or Megatron's optimizer, under Megatron's local
layers: fp32 weights, of which each forward takes bf16 copies.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.device_stages import tiny
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from sfpo_megatron.config.tree import RunConfig
    from sfpo_megatron.mcore.setup import Policy

NUM_STEPS = 2
LOSS_BOUND, NORM_BOUND = 5e-3, 0.05
"""Absolute, and relative: several times what one rounding to bf16 more or less makes."""


def run(device: torch.device, impl: Literal["te", "local"] = "local") -> dict[str, Any]:
    """Losses and gradient norms of every minibatch, ours against the plain trainer's."""
    from sfpo_megatron.mcore import setup

    with tiny.alone(device) as folder:
        config = tiny.run_config(folder, impl, "bfloat16")
        policy, capabilities = tiny.build(config)
        if device.type == "cuda":
            assert "sfpo_megatron.mcore.cpu" not in sys.modules, "the CPU bridge is imported"
            assert dist.get_backend() == "nccl", dist.get_backend()
        plain = PlainModel(config, policy, device)
        ours = train(config, policy)
        theirs = train_plain(plain, config, device)
        setup.shut_down()
    losses = (ours[:, 0] - theirs[:, 0]).abs()
    norms = (ours[:, 1] / theirs[:, 1] - 1).abs()
    figures = {
        "layers": capabilities.layers,
        "adam": capabilities.adam,
        "optimizer_steps": len(ours),
        "loss_difference": float(losses.max()),
        "grad_norm_difference": float(norms.max()),
    }
    assert figures["loss_difference"] < LOSS_BOUND, figures
    assert figures["grad_norm_difference"] < NORM_BOUND, figures
    return figures


def run_te(device: torch.device) -> dict[str, Any]:
    """The same with TransformerEngine's layers and Adam on our side."""
    return run(device, "te")


def train(config: RunConfig, policy: Policy) -> Tensor:
    """(loss, gradient norm) of every optimizer step."""
    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.objectives.objective import PolicyObjective

    objective, snapshot = PolicyObjective.of(config), SlowSnapshot(policy.shards)
    history = []
    for step in range(NUM_STEPS):
        minibatches = cut(config, policy, tiny.batch(step))
        set_old_logprobs(minibatches, compute_logprobs(policy, minibatches, temperature=1.0))
        one_pass = partial(run_pass, policy, minibatches, objective)
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


class PlainModel(torch.nn.Module):
    """Megatron's model under its local layers, called as transformers' are; its parameters are the
    fp32 weights."""

    def __init__(self, config: RunConfig, policy: Policy, device: torch.device) -> None:
        from sfpo_megatron.mcore.model import build_chunks, transformer_config
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
        from megatron.core.packed_seq_params import PackedSeqParams

        length = tokens.shape[1]
        ends = torch.tensor([0, length], dtype=torch.int32, device=tokens.device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        rounded = {n: w.bfloat16() for n, w in zip(self.names, self.weights, strict=True)}
        positions = torch.arange(length, device=tokens.device)[None]
        logits = torch.func.functional_call(
            self._called[0], rounded, (tokens, positions, None), {"packed_seq_params": packed}
        )
        return SimpleNamespace(logits=logits.float())
