"""One train step's line of metrics.jsonl, but for its times: docs/outputs.md describes each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.passes import PassResult
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.objectives.advantage import zero_variance
from sfpo_megatron.outputs.percentiles import percentiles
from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.rollout.reports import ScoredRequest, environment_metrics
from sfpo_megatron.snapshots.predicted import Scales
from sfpo_megatron.types import Minibatch, RolloutBatch

_ONCE_A_STEP = ("mismatch_weight_mean", "mismatch_rejected", "ref_kl")
"""Logged under their own names, of the slow correction; all others pass by pass. The generator's
gap is the same in every pass."""
_COMPARED = ("logprob", "reference", "passes", "reposition", "refit", "onload", "offload")
"""Phases that every rank has a part in."""


@dataclass(kw_only=True, slots=True)
class Totals:
    """What is counted over the whole run; part of every checkpoint."""

    num_rollouts: int = 0
    num_optimizer_steps: int = 0
    num_skipped_steps: int = 0

    def state_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at saved counts."""
        for count in fields(self):
            setattr(self, count.name, state[count.name])


def logprob_difference(policy: Policy, minibatches: list[Minibatch]) -> dict[str, float]:
    """Generator against trainer over all trained tokens, by `old_logprobs`: mean and maximum of
    |difference|, and the k1 estimate of KL(generator || trainer). Collective."""
    total, highest = torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for microbatch in (m for minibatch in minibatches for m in minibatch.microbatches):
        if microbatch.old_logprobs is None or policy.layout.tensor_rank != 0:
            continue  # log-probs live on the last stage; tensor-parallel ranks hold the same
        gap = microbatch.generator_logprobs - microbatch.old_logprobs
        gap = gap[microbatch.loss_mask].double().cpu()
        total += torch.tensor([gap.abs().sum(), gap.sum(), gap.numel()], dtype=torch.float64)
        highest = torch.maximum(highest, gap.abs().max() if gap.numel() else highest)
    difference, signed, count = policy.control.sum(total).tolist()
    count = count or math.nan  # every rollout is masked out
    return {
        "logprob_diff_mean": difference / count,
        "logprob_diff_max": policy.control.max(highest).item(),
        "generator_kl": signed / count,
    }


def batch_metrics(batch: RolloutBatch, totals: Totals) -> dict[str, float]:
    """What the rollouts say, before any update."""
    totals.num_rollouts += batch.num_rollouts
    same_rewards = zero_variance(batch.rewards, batch.group_size)
    solved = batch.correct.view(-1, batch.group_size)  # [prompts, G]
    lengths = batch.trained_lengths.float()
    return {
        "num_rollouts": totals.num_rollouts,
        "reward_mean": batch.rewards.mean().item(),
        **_percentiles("reward", batch.rewards),
        "accuracy": batch.correct.float().mean().item(),
        "zero_variance_groups": same_rewards.float().mean().item(),
        "solved_by_all": solved.all(dim=1).float().mean().item(),
        "solved_by_none": (~solved).all(dim=1).float().mean().item(),
        "truncated": (~batch.finished).float().mean().item(),
        "response_tokens_mean": lengths.mean().item(),
        **_percentiles("response_tokens", lengths),
    }


def _percentiles(name: str, values: Tensor) -> dict[str, float]:
    """`NAME_p10`, `NAME_p50`, `NAME_p90` and `NAME_max` of the [N] values."""
    found: dict[str, float] = percentiles(values.tolist(), 10, 50, 90)
    return {f"{name}_{which}": value for which, value in found.items()}


def rank_metrics(
    control: ControlGroup, times: Mapping[str, float], peaks: Mapping[str, int]
) -> dict[str, float]:
    """`ranks/...`: of each phase of `_COMPARED`, the longest and the shortest time over all ranks,
    and who took the longest; `memory/...`: the largest of the `peaks`. Every rank has the same
    phases. Collective."""
    mine: list[dict[str, float]] = [dict(times), {**peaks}]
    everyone = control.all_gather_json(mine)
    found: dict[str, float] = {}
    for phase in _COMPARED if len(everyone) > 1 else ():
        key = f"time/{phase}_s"
        if key not in times:
            continue
        seconds = [of_rank[key] for of_rank, _ in everyone]
        found |= {
            f"ranks/{phase}_max_s": max(seconds),
            f"ranks/{phase}_min_s": min(seconds),
            f"ranks/{phase}_slowest": seconds.index(max(seconds)),
        }
    for phase in peaks:
        found[f"memory/{phase}_peak_bytes"] = max(of_rank.get(phase, 0) for _, of_rank in everyone)
    return found


def split_metrics(minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """What the split costs."""
    tokens = sum(minibatch.global_tokens for minibatch in minibatches)
    padded = sum(minibatch.global_padded_tokens for minibatch in minibatches)
    return {
        "num_microbatches": sum(len(minibatch.microbatches) for minibatch in minibatches),
        "padding": 1 - tokens / padded,
    }


def pass_metrics(results: Sequence[PassResult], totals: Totals) -> dict[str, float]:
    """`loss, entropy, grad_norm, clip_frac, ppo_kl` of the slow correction; `*_first_pass` of the
    first minibatch before any update, where the ratio must be 1; `pass_k/...` of every pass: what
    the objective finds, by its names."""
    totals.num_optimizer_steps += sum(len(result.minibatches) for result in results)
    totals.num_skipped_steps += sum(result.num_skipped for result in results)
    slow, first = results[-1], results[0].minibatches[0]
    clip_frac = slow.mean(lambda m: m.stats["clip_frac_low"] + m.stats["clip_frac_high"])
    metrics = {
        "loss": slow.mean(lambda m: m.loss),
        "entropy": slow.mean(lambda m: m.entropy),
        "grad_norm": slow.grad_norm,
        "clip_frac": clip_frac,
        "ppo_kl": slow.mean_of("ppo_kl"),
        "ratio_mean_first_pass": first.stats["ratio_mean"],
        "ppo_kl_first_pass": first.stats["ppo_kl"],
        "num_passes": len(results),
        "num_optimizer_steps": totals.num_optimizer_steps,
        "num_skipped_steps": totals.num_skipped_steps,
    }
    metrics |= {name: slow.mean_of(name) for name in _ONCE_A_STEP if name in first.stats}
    for k, result in enumerate(results, start=1):
        metrics |= one_pass_metrics(k, result)
    return metrics


def one_pass_metrics(k: int, result: PassResult) -> dict[str, float]:
    """How far pass k (from 1; the last is the slow correction) has drifted from the old policy."""
    found = {
        **result.means,
        **result.maxima,
        "entropy": result.mean(lambda m: m.entropy),
        "grad_norm": result.grad_norm,
        "loss": result.mean(lambda m: m.loss),
    }
    return {f"pass_{k}/{name}": value for name, value in found.items() if name not in _ONCE_A_STEP}


def prediction_metrics(control: ControlGroup, scales: Scales) -> dict[str, float]:
    """`prediction/...`: q of the reposition that was made, which is 1 everywhere if nothing was
    predicted. Elements that several ranks hold count on each. Collective."""
    sums, largest = scales.take()
    numel, total, clipped, ones = control.sum(sums).tolist()
    return {
        "prediction/q_mean": total / numel if numel else 1.0,
        "prediction/q_max": control.max(largest).item(),
        "prediction/clipped": clipped / numel if numel else 0.0,
        "prediction/inactive": ones / numel if numel else 1.0,
    }


def rollout_metrics(scored: ScoredRequest, staleness: int) -> dict[str, float]:
    """What the engines and the scorers say of a step's rollouts, `staleness` updates old."""
    counts = scored.counts
    return {
        "time/generate_s": scored.times.generate_s,
        "time/reward_s": scored.times.reward_s,
        "staleness": staleness,
        "num_sampling_rounds": counts.num_rounds,
        "num_groups_generated": counts.num_groups,
        "num_groups_zero_variance": counts.num_zero_variance,
        "num_groups_truncated": counts.num_truncated,
        "num_groups_duplicate": counts.num_duplicate,
        "num_groups_surplus": counts.num_surplus,
        "num_groups_taken_back": counts.num_taken_back,
        "kv_cache_usage_max": scored.load.kv_cache_usage,
        "num_preemptions": scored.load.num_preemptions,
        "engines/queue_s": scored.load.mean_queue_s,
        "engines/busy": scored.load.busy_in(scored.times.generate_s),
        "num_reissued": scored.num_reissued,
        "num_engine_restarts": scored.num_restarts,
        **part_means(scored.rollouts, "reward/"),
        **environment_metrics(scored.rollouts),
    }
