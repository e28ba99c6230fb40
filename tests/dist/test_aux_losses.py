"""Router auxiliary losses: their gradient is that of a mean over tokens, however a batch is split.

The reference is written out on the transformers model: token loss (plain_sfpo.py) + switch loss and
z-loss from the router's logits. Not exercised here: sequence- and global-level load balancing,
recomputation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
import torch.distributed as dist
from harness import EP2, PP2, SP2EP2, TP1, VPP2, on_ranks
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

MODEL = references.TRAINED_MOE
NUM_EXPERTS, TOP_K = 4, 2
SWITCH, Z = 0.3, 0.05
"""Coefficients: large, or the token loss would hide a wrong one."""


def plain_gradients(bench: Workbench, packs: list[tuple[list[Tensor], int]]) -> list[Tensor]:
    """Router gradients by layer for minibatch 0. A pack: its sequences, how many tokens count."""
    import plain_sfpo

    # Made again from its seed: transformers' loading does not work under the CPU bridge.
    model = references.make_model(MODEL, bench.directory / f"again{bench.rank}")
    batch = references.load_batch(bench.directory, 0)
    lengths = (batch["prompt_lengths"] + batch["response_lengths"]).tolist()
    half = len(lengths) // references.MINIBATCHES
    tokens, prompts = batch["token_ids"].split(lengths), batch["prompt_lengths"].tolist()
    advantages = plain_sfpo.advantages(batch["rewards"], references.GROUP_SIZE)
    settings = plain_sfpo.Settings(
        k=0, alpha=0.0, minibatches=2, group_size=references.GROUP_SIZE, lr=0.0, weight_decay=0.0,
        clip_grad=0.0, clip=0.2, entropy_coef=0.0, eps=1.0,
    )  # fmt: skip
    rows = []
    for t, p, a in zip(tokens[:half], prompts, advantages, strict=False):
        with torch.no_grad():
            old = plain_sfpo.token_logprobs(model, t, p)[0]
        rows.append((t, p, a, old))
    routers = [layer.mlp.gate for layer in model.model.layers]
    plain_sfpo.minibatch_loss(model, rows, settings).backward()
    without = [router.weight.grad.clone() for router in routers]

    seen: list[list[Tensor]] = [[] for _ in routers]
    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda _, __, out, at=layer: seen[at].append(out[0]))
    total = sum(lengths[:half])
    for sequences, counted in packs:
        for sequence in sequences:
            model(sequence[None])
        for logits in (torch.cat(found)[:counted] for found in seen):
            probs = torch.softmax(logits, dim=-1)
            chosen = torch.zeros_like(probs).scatter(1, probs.topk(TOP_K).indices, 1.0)
            switch = NUM_EXPERTS / TOP_K * (chosen.mean(0).detach() * probs.mean(0)).sum()
            z = torch.logsumexp(logits, dim=-1).square().mean()
            ((SWITCH * switch + Z * z) * counted / total).backward(retain_graph=True)
        for found in seen:
            found.clear()
    gradients = [router.weight.grad for router in routers]
    for with_aux, alone in zip(gradients, without, strict=True):
        assert (with_aux - alone).norm() > 0.2 * alone.norm(), "the case is too small to bite"
    return gradients


@on_ranks(
    *(TP1, EP2, VPP2, PP2, SP2EP2),
    full=[
        *("DP2xEP2-25", "PP2xVPP2-25", "PP2xVPP2-40", "PP2-25", "PP2-40"),
        "TP2+SPxEP2-25",
    ],
    max_tokens=[25, 40],
)
def test_gradients_are_those_of_a_mean_over_tokens(bench: Workbench, max_tokens: int) -> None:
    """Two ways to split the batch; also with padding (VPP2, SP2) and, on every rank, a pack of
    nothing but padding. Measured: about 1e-6."""
    import dataclasses

    from sfpo_megatron.batching import pack
    from sfpo_megatron.mcore import passes
    from sfpo_megatron.mcore.model import named_params
    from sfpo_megatron.objectives.objective import PolicyObjective

    policy = bench.policy(
        MODEL,
        max_tokens=max_tokens,
        ddp={"use_distributed_optimizer": False},  # then main_grad is whole on every rank
        transformer={
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": SWITCH,
            "moe_z_loss_coeff": Z,
        },
    )
    minibatch = bench.minibatches(policy)[0]
    empty = pack(
        [],
        bench.layout.tensor if bench.layout.sequence else 1,
        at_least=minibatch.microbatches[0].token_ids.numel() if bench.layout.pipeline > 1 else 1,
    )
    count = policy.layout.pipeline_size if bench.layout.virtual else 1
    minibatch = dataclasses.replace(
        minibatch, microbatches=minibatch.microbatches + (empty,) * count
    )
    passes.set_old_logprobs(
        [minibatch],
        passes.compute_logprobs(policy, [minibatch], temperature=bench.temperature(policy)),
    )
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    objective = PolicyObjective.of(bench.config_of(policy))
    passes._forward_backward(policy, minibatch, objective)

    mine = [
        (list(m.token_ids[: max(m.num_tokens, 1)].split(lengths_of(m))), max(m.num_tokens, 1))
        for m in minibatch.microbatches
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine if is_first_of_its_packs(policy) else [])
    expected = plain_gradients(bench, [p for packs in everyone for p in packs])
    compared = 0
    for name, param in named_params(policy.chunks):
        if name.endswith("router.weight"):
            wanted = expected[int(name.split(".")[2])]
            error = (param.main_grad - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-4, f"{name}: relative error {error:.1e}"
            compared += 1
    assert compared == 4 // policy.layout.pipeline_size


def lengths_of(microbatch: Any) -> list[int]:
    """Lengths of its sequences without padding; an empty pack keeps one token of it."""
    left, result = max(microbatch.num_tokens, 1), []
    for length in microbatch.cu_seqlens.diff().tolist():
        if left > 0:
            result.append(min(length, left))
            left -= length
    return result


def is_first_of_its_packs(policy: Any) -> bool:
    """Tensor- and pipeline-parallel ranks work on the same packs."""
    return bool(policy.layout.tensor_rank == 0 and policy.layout.pipeline_rank == 0)
