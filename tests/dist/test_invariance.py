"""The gradient of a minibatch does not depend on how it is split.

Main grads (fp32, as the optimizer finds them) of the same 16 rollouts under every split of SPLITS
in every layout, clipping active on both sides, against float64 on a transformers model
(exact_gradients.py) and against one another. What is compared is the whole gradient as one vector:
the relative difference of its norm, and the largest difference over the largest element.

Bounds:
- fp32, 1e-6 between splits: each element is a sum over the tokens, in another order. The forward
  differs too: a matrix product of other height may sum in other blocks (measured: up to 7e-7).
- fp32 with experts, 2e-6 between splits: an expert's products are over the few tokens routed to it,
  so that every split changes the height of each of them (measured: 1.0e-6).
- fp32 on two tensor-parallel ranks, 3e-6 from TP1: each product's sum is in two parts (measured:
  1.4e-6).
- fp32, 3e-6 from float64: what fp32 costs under any split (measured: 1.2e-6; transformers' own
  fp32 gradient is as far away).
- bf16 params and activations, 0.06 from float64 and 0.04 between splits. One rounding to bf16 is
  off by up to 2^-8 = 0.004, 0.0016 rms; a gradient has passed about 4 layers x 25 of them, forward
  and back, which add up like a random walk to 0.016, and the largest element strays further
  (measured: up to 0.046). Which way each is rounded depends on the order of the fp32 sum before it,
  so splits differ by a part of that error (measured: up to 0.021). Main grads are added up in fp32.

Not exercised here: tensor parallelism, but for the masked batch (test_exactness.py), MoE's
auxiliary losses, the optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import exact_gradients
import references
import torch
from harness import CP2, DP2, EP2, EP2PP2, PP2, PP2DP2, TP1, TP2, VPP2, on_ranks
from made.batches import make_batch
from torch import Tensor

from sfpo_megatron.batching import build_minibatches
from sfpo_megatron.config.tree import ObjectiveConfig
from sfpo_megatron.objectives.advantage import grpo
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.types import Minibatch

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy

SPLITS: dict[str, dict[str, Any]] = {
    "two sequences": {"microbatch_size": 2},  # the others are compared with the first
    "one sequence": {"microbatch_size": 1},
    "four sequences": {"microbatch_size": 4},
    "24 tokens": {"max_tokens": 24},
    "50 tokens": {"max_tokens": 50},
    "one microbatch": {"max_tokens": 1000},
    "padded to 16": {"max_tokens": 60, "pad_multiple": 16},
    "an empty microbatch": {"max_tokens": 60, "microbatch_multiple": 12},
    "other order": {"max_tokens": 60},
}
"""BatchLayout's fields."""
BETWEEN_SPLITS, FROM_FLOAT64 = 1e-6, 3e-6
EXPERTS_BETWEEN_SPLITS = 2e-6
TENSOR_BETWEEN_SPLITS = 3e-6
BF16_BETWEEN_SPLITS, BF16_FROM_FLOAT64 = 0.04, 0.06


def gradients(
    bench: Workbench, policy: Policy, exact: exact_gradients.ExactGradients, split: str
) -> tuple[dict[str, Tensor], float]:
    """(gradient by Hugging Face name, loss) of the batch under `split`. Collective."""
    from sfpo_megatron.mcore.passes import _forward_backward

    minibatch = cut(bench, policy, exact, split)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    policy.shards.ready_for_training()
    objective = PolicyObjective.of(bench.config_of(policy))
    totals = [_forward_backward(policy, minibatch, objective)]
    (reduced,) = policy.statistics.reduce(objective, totals)
    return bench.hf_gradients(policy), reduced.loss / objective.normalizer(minibatch)


def cut(
    bench: Workbench, policy: Policy, exact: exact_gradients.ExactGradients, split: str
) -> Minibatch:
    """This rank's part of batch 0 as one minibatch, with the old_logprobs and the response mask of
    `exact`."""
    from sfpo_megatron.mcore.batches import batch_layout

    saved = references.load_batch(bench.directory, 0)
    prompts, responses = saved["prompt_lengths"], saved["response_lengths"]
    advantages = grpo(saved["rewards"], references.GROUP_SIZE, ObjectiveConfig())
    order = torch.arange(prompts.numel())
    if split == "other order":
        order = torch.randperm(prompts.numel(), generator=torch.Generator().manual_seed(1))

    def ordered(values: Tensor, lengths: Tensor) -> Tensor:
        parts = values.split(lengths.tolist())
        return torch.cat([parts[i] for i in order.tolist()])

    batch = make_batch(
        prompts[order],
        responses[order],
        ordered(saved["token_ids"], prompts + responses),
        group_size=references.GROUP_SIZE,
        generator_logprobs=ordered(exact.old_logprobs, responses),
        response_mask=ordered(exact.response_mask, responses),
        rewards=saved["rewards"][order],
    )
    layout = dataclasses.replace(batch_layout(bench.config_of(policy), policy, 1), **SPLITS[split])
    (minibatch,) = build_minibatches(batch, advantages[order], layout)
    for microbatch in minibatch.microbatches:  # they travelled as generator_logprobs
        microbatch.old_logprobs = microbatch.generator_logprobs
    return minibatch


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The larger of the two relative differences of gradient a from b."""
    assert a.keys() == b.keys()
    x, y = (torch.cat([g[name].double().flatten() for name in b]) for g in (a, b))
    assert y.norm() > 0.1
    error = x - y
    return max((error.norm() / y.norm()).item(), (error.abs().max() / y.abs().max()).item())


def compare_splits(
    bench: Workbench,
    model: str,
    *,
    bound: float,
    from_exact: float,
    mask: str = "",
    **settings: Any,
) -> None:
    """Every split against the first one at TP1 and against float64."""
    objective = ObjectiveConfig(entropy_coef=references.ENTROPY_COEF)
    policy = bench.policy(model, objective=objective, **settings)
    exact = exact_gradients.load(bench.directory, f"{model}{mask}")
    found = {split: gradients(bench, policy, exact, split) for split in SPLITS}
    name = f"{model}{mask}.split-{settings}"
    if bench.layout == TP1:
        bench.save(name, None, found["two sequences"][0])
    first = bench.load(name)[1]
    between = {split: difference(grads, first) for split, (grads, _) in found.items()}
    beyond = {split: difference(grads, exact.gradient) for split, (grads, _) in found.items()}
    bench.figures["between_splits"] = max(between.values())
    bench.figures["from_float64"] = max(beyond.values())
    for split, (_, loss) in found.items():
        assert abs(loss - exact.loss) < from_exact, f"{split}: loss {loss}, exact {exact.loss}"
        assert between[split] <= bound, f"{split}: {between[split]:.1e} from {next(iter(SPLITS))}"
        assert beyond[split] <= from_exact, f"{split}: {beyond[split]:.1e} from float64"


def compare_fp32(bench: Workbench, model: str, per_token: bool, mask: str = "") -> None:
    compare_splits(
        bench,
        model,
        # Of the split at TP1, under the local spec: TP2 and other layers sum in another order.
        bound=TENSOR_BETWEEN_SPLITS if bench.layout in (TP2, CP2) else BETWEEN_SPLITS,
        from_exact=FROM_FLOAT64,
        mask=mask,
        transformer={"calculate_per_token_loss": per_token},
    )


@on_ranks(TP1, EP2, PP2, EP2PP2, needs=TP1, only=[], model=[references.TRAINED_MOE])
def test_gradients_of_experts_fp32(bench: Workbench, model: str) -> None:
    """Without auxiliary losses (test_aux_losses.py)."""
    compare_splits(bench, model, bound=EXPERTS_BETWEEN_SPLITS, from_exact=FROM_FLOAT64)


@on_ranks(
    *(TP1, DP2, PP2, VPP2, PP2DP2),
    needs=TP1,
    only=[f"{layout.name}-qwen2_tied-False" for layout in (TP1, DP2, PP2)],
    model=references.TRAINED,
    per_token=[False, True],
)
def test_gradients_fp32(bench: Workbench, model: str, per_token: bool) -> None:
    """`per_token`: megatron.transformer.calculate_per_token_loss, with which Megatron divides by
    the global token count instead of the microbatch count."""
    compare_fp32(bench, model, per_token)


@on_ranks(
    *(TP1, DP2, PP2, TP2),
    needs=TP1,
    only=[f"{layout.name}-False" for layout in (TP1, DP2)],
    per_token=[False, True],
)
def test_gradients_of_a_masked_batch(bench: Workbench, per_token: bool) -> None:
    """Some response tokens are not the model's own; two rollouts have none that is."""
    compare_fp32(bench, "qwen2_tied", per_token, mask="-masked")


@on_ranks(CP2, TP1, needs=TP1, only=[], per_token=[False, True])
def test_context_parallel_gradients_of_a_masked_batch_te_spec(
    bench: Workbench, per_token: bool
) -> None:
    compare_fp32(bench, "qwen2_tied", per_token, mask="-masked")


@on_ranks(CP2, TP1, needs=TP1, only=[], model=references.TRAINED, per_token=[False, True])
def test_context_parallel_gradients_te_spec(bench: Workbench, model: str, per_token: bool) -> None:
    """Every sequence split over two ranks, under Megatron's TransformerEngine layer spec over
    tests/te_standin; TP1 is under the local spec."""
    compare_fp32(bench, model, per_token)


@on_ranks(DP2, model=["qwen2_tied"])
def test_per_token_loss_with_another_normalizer(bench: Workbench, model: str) -> None:
    """A mean over sequences is not divided by tokens, however Megatron goes about it."""
    objective = ObjectiveConfig(aggregation="seq_mean_token_mean")
    exact = exact_gradients.load(bench.directory, model)
    found = []
    for per_token in (False, True):
        transformer = {"calculate_per_token_loss": per_token}
        policy = bench.policy(model, objective=objective, transformer=transformer)
        found.append(gradients(bench, policy, exact, "50 tokens"))
    assert abs(found[1][1] - found[0][1]) < 1e-6
    assert difference(found[1][0], found[0][0]) <= BETWEEN_SPLITS


@on_ranks(TP1, DP2, PP2, VPP2, needs=TP1, only=[], model=references.TRAINED)
def test_gradients_bf16(bench: Workbench, model: str) -> None:
    compare_splits(
        bench, model, bound=BF16_BETWEEN_SPLITS, from_exact=BF16_FROM_FLOAT64, dtype="bfloat16"
    )
