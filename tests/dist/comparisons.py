"""What a policy computes and how it trains, against what references.py has made beforehand.

Imported by the test modules, so by pytest's own process too: Megatron inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from references import SEQUENCES, VOCAB_SIZE
from safetensors.torch import load_file
from torch import Tensor

from sfpo_megatron.config.tree import ObjectiveConfig
from sfpo_megatron.sfpo import SlowSnapshot, Snapshot, sfpo_step
from sfpo_megatron.snapshots.moments import MomentSnapshot
from sfpo_megatron.snapshots.predicted import PredictedSnapshot, Scales

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy


def train(
    bench: Workbench,
    model: str,
    *,
    k: int = references.K,
    alpha: float = references.ALPHA,
    predicted: bool = False,
    **settings: Any,
) -> tuple[list[Any], dict[str, Tensor]]:
    """((loss, gradient norm) [step][pass][minibatch], Hugging Face weights) after all batches."""
    objective = ObjectiveConfig(entropy_coef=references.ENTROPY_COEF)
    policy = bench.policy(model, objective=objective, **settings)
    snapshot = predicting(policy, k) if predicted else SlowSnapshot(policy.shards)
    history, clipped = [], 0.0
    for step in range(references.NUM_STEPS):
        minibatches = bench.prepared(policy, step)
        results = sfpo_step(
            bench.one_pass(policy, minibatches),
            snapshot,
            num_fast_passes=2 if predicted else k,
            alpha=alpha,
        )
        first = results[0].minibatches[0]
        assert abs(first.stats["ppo_kl"]) < 1e-6 and abs(first.stats["ratio_mean"] - 1) < 1e-6
        for one in (m for result in results for m in result.minibatches):
            assert one.grad_norm > 0 and not one.skipped, f"step {step}: {results}"
            clipped = max(clipped, one.stats["clip_frac_low"] + one.stats["clip_frac_high"])
        history.append([[[m.loss, m.grad_norm] for m in result.minibatches] for result in results])
    assert clipped > 0.05 or k < references.K, (
        f"clipping was not active (at most {clipped:.3f} of the tokens)"
    )
    return history, bench.hf_weights(policy)


def predicting(policy: Policy, horizon: int) -> Snapshot:
    """PrePO's, with the optimizer state put back."""
    from sfpo_megatron.mcore.trajectory import MainParamTrajectory

    snapshot = PredictedSnapshot(
        MainParamTrajectory(policy),
        horizon=horizon,
        steps_per_pass=references.MINIBATCHES,
        scales=Scales(),
    )
    return MomentSnapshot(snapshot, policy.shards, mode="restore")


def compare(
    got: tuple[list[Any], dict[str, Tensor]],
    wanted: tuple[list[Any], dict[str, Tensor]],
    *,
    loss_bound: float,
    weight_bound: float,
) -> None:
    (losses, norms), (expected, expected_norms) = (
        torch.tensor(history).unbind(-1) for history in (got[0], wanted[0])
    )
    assert losses.shape == expected.shape == (references.NUM_STEPS, references.K + 1, 2)
    # The first step's norm: a wrong one hides in Adam, which divides it out again, for a while.
    torch.testing.assert_close(norms[0, 0, 0], expected_norms[0, 0, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, expected_norms, rtol=5e-3, atol=1e-4)
    error = (losses - expected).abs()
    assert error.max() <= loss_bound, f"losses differ by {error.max():.2e}:\n{error}"
    assert got[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        difference = (got[1][name] - tensor).abs().max()
        assert difference <= weight_bound, f"{name} differs by {difference:.2e}"


def check_logits(bench: Workbench, model: str, bound: float, **settings: Any) -> None:
    """max |ours - transformers'| <= bound * max |transformers'|."""
    check_logits_of(bench, bench.policy(model, **settings), model, bound)


def check_logits_of(bench: Workbench, policy: Policy, model: str, bound: float) -> None:
    from sfpo_megatron.batching import PackRow, pack

    expected = load_file(bench.directory / f"{model}.logits.safetensors")
    rows = [
        PackRow(
            token_ids=part,
            prompt_length=2,
            advantage=0.0,
            generator_logprobs=torch.zeros(n - 2),
            response_mask=torch.ones(n - 2, dtype=torch.bool),
        )
        for part, n in zip(expected["token_ids"].split(SEQUENCES), SEQUENCES, strict=True)
    ]
    multiple = bench.layout.tensor if bench.layout.sequence else 1
    alone = [bench.logits(policy, pack([row], multiple)) for row in rows]
    packed = bench.logits(policy, pack(rows, multiple))
    if not policy.layout.is_last_stage:
        assert packed is None and alone == [None] * len(rows)
        return
    padded = policy.shape.padded_vocab_size(bench.layout.tensor)
    assert packed is not None and packed.shape[1] == padded

    bench.figures["max_difference"] = 0.0

    def close(name: str, got: Tensor, wanted: Tensor) -> None:
        error = (got - wanted).abs().max() / wanted.abs().max()
        bench.figures["max_difference"] = max(bench.figures["max_difference"], float(error))
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound}"

    logits = expected["logits"]
    total = sum(SEQUENCES)
    close("packed", packed[:total, :VOCAB_SIZE], logits)
    for i, (got, wanted) in enumerate(zip(alone, logits.split(SEQUENCES), strict=True)):
        assert got is not None
        close(f"sequence {i} alone", got[: SEQUENCES[i], :VOCAB_SIZE], wanted)
    assert logits.std() > 0.5, "logits this flat would not show a fault"
