"""What a train step did a second: tokens, model FLOPs, and the share of the peak they are."""

from __future__ import annotations

from collections.abc import Mapping

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.planner.time import forward_flops
from sfpo_megatron.run.peak import trainer_peak_flops
from sfpo_megatron.types import RolloutBatch


class Speed:
    """The speed of each step of a run."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self._config = config
        self._policy = policy
        self._peak_flops: float | None = None

    def of(self, batch: RolloutBatch, metrics: Mapping[str, float]) -> dict[str, float]:
        """`speed_metrics` of a step. The first call finds the peak, and not the start: there
        engines that load would share the cores. Collective."""
        if self._peak_flops is None:
            self._peak_flops = trainer_peak_flops(self._policy)
        return speed_metrics(
            self._config, self._policy, batch, metrics, peak_flops=self._peak_flops
        )


def speed_metrics(
    config: RunConfig,
    policy: Policy,
    batch: RolloutBatch,
    metrics: Mapping[str, float],
    *,
    peak_flops: float,
) -> dict[str, float]:
    """`speed/...` of a step with these `metrics`, among them its times, by trainers of this peak
    (`peak.py`; 0: not known). Other ranks than 0 have no time of generation, and get no speed of
    it. Not collective."""
    num_ranks = policy.control.size
    num_tokens, num_passes = batch.token_ids.numel(), metrics["num_passes"]
    num_devices = num_ranks + _num_engine_devices(config)
    # A backward is two forwards.
    model_flops = 3 * forward_flops(policy.shape, num_tokens / batch.num_rollouts)
    model_flops *= num_tokens * num_passes
    found = {
        "generation_tokens_per_s": (int(batch.trained_lengths.sum()), "time/generate_s"),
        "training_tokens_per_s": (num_tokens * num_passes, "time/passes_s"),
        "tokens_per_s": (num_tokens, "time/step_s"),
        "tokens_per_s_per_device": (num_tokens / num_devices, "time/step_s"),
        "model_flops_per_s": (model_flops, "time/passes_s"),
    }
    if peak_flops:
        found["mfu"] = (model_flops / peak_flops, "time/passes_s")
    return {f"speed/{name}": n / metrics[s] for name, (n, s) in found.items() if metrics.get(s)}


def _num_engine_devices(config: RunConfig) -> int:
    """Devices that are the engines' alone."""
    rollout = config.rollout
    if rollout.placement == "colocated" or config.debug.train_only is not None:
        return 0
    return rollout.num_engine_ranks
