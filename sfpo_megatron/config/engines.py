"""What engines and refit cannot do together with the rest of a run."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.model_files import Problem
from sfpo_megatron.config.tree import RunConfig


def engines(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.async_steps and not config.objective.importance_sampling.is_on:
        yield Problem(
            "rollout.async_steps",
            "1 without objective.importance_sampling",
            "a correction for rollouts by weights one update old",
            "set objective.importance_sampling.weight: token",
            "warning",
        )
    if "zero_variance" in rollout.drop_groups and config.objective.zero_variance_groups == "mask":
        yield Problem(
            "rollout.drop_groups",
            "zero_variance with objective.zero_variance_groups: mask",
            "one of the two",
            "with both, only groups that are taken back after rollout.max_rounds are masked",
            "warning",
        )
    if rollout.drop_groups and config.debug.train_only:
        yield Problem(
            "rollout.drop_groups",
            "set with debug.train_only",
            "engines to make other groups with",
            "saved batches are trained on as they are",
            "warning",
        )
    if rollout.quantization and config.model.dtype == "float32":
        yield Problem(
            "rollout.quantization",
            f"{rollout.quantization} with model.dtype: float32",
            "bfloat16 or float16, which vLLM can quantize online",
            "set model.dtype: bfloat16",
        )
    if rollout.quantization and not config.objective.importance_sampling.is_on:
        yield Problem(
            "rollout.quantization",
            f"{rollout.quantization} without objective.importance_sampling",
            "a correction for rollouts by other weights than the trainer's",
            "set objective.importance_sampling.weight: token",
            "warning",
        )
    if rollout.engine_args.get("enable_sleep_mode"):
        yield Problem(
            "rollout.engine_args.enable_sleep_mode",
            "true",
            "false with rollout.placement: dedicated",
            "remove it: dedicated engines have nobody to give their memory to",
        )


def transport_of_device(config: RunConfig, model: object, on_cpu: bool) -> Iterator[Problem]:
    """As `MODEL_RULES`: known once it is known where the run is."""
    if config.refit.transport == "nccl_stages" and on_cpu:
        yield Problem(
            "refit.transport",
            "nccl_stages without a CUDA device",
            "gloo, shm or auto here",
            "set refit.transport: gloo, which is the same over another library",
            "error_when_training",
        )
