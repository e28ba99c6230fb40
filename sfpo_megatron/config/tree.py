"""The config tree: one frozen dataclass a section, every default stated once, on its field here
or in the module of its section.

Ordered as the data walks (docs/configuration.md). No torch: a login node validates a run with it.
A field that is wrong on its own is refused at construction with `FieldError`; what needs two
sections or the model's files is refused by `check.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sfpo_megatron.config.checkpoint import CheckpointConfig
from sfpo_megatron.config.data import DataConfig
from sfpo_megatron.config.data import DataSource as DataSource
from sfpo_megatron.config.fields import (
    FieldError,
    at_least,
    first_repeated,
    known,
    positive,
    within,
)
from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.reward import RewardChoice, RewardConfig
from sfpo_megatron.config.rollout import RefitConfig, RolloutConfig
from sfpo_megatron.config.tracing import TraceConfig
from sfpo_megatron.config.training import OptimizerSection as OptimizerSection
from sfpo_megatron.config.training import SFTConfig, TrainConfig
from sfpo_megatron.plugins import SINK


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelConfig:
    """The policy that is trained."""

    path: str
    """A Hugging Face model directory (config.json, *.safetensors, tokenizer.json)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the model params and of the engine; the optimizer's main params are fp32. float16
    has a dynamic loss scale (megatron.optimizer.initial_loss_scale, loss_scale_window ...)."""
    transformer_impl: Literal["auto", "te", "local"] = "auto"
    """Megatron layer spec: TransformerEngine, torch, or the better of what is installed."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ParallelConfig:
    """How the trainer's ranks are laid out: data x tensor x pipeline x context of them."""

    data: int | None = 1
    """Data-parallel size; null: the number of ranks that torchrun or Slurm has started / (tensor x
    pipeline x context)."""
    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); null for one."""
    expert: int = 1
    """Expert-parallel size (mixture-of-experts models)."""
    expert_tensor: int = 1
    """Tensor-parallel size inside an expert."""
    context: int = 1
    """Context-parallel size: ranks that share every sequence (needs TransformerEngine)."""
    sequence: bool = False
    """Sequence parallelism: activations of norms are split over the tensor-parallel ranks."""

    def __post_init__(self) -> None:
        at_least(self, 1, "data", "tensor", "pipeline", "expert", "expert_tensor", "context")
        at_least(self, 2, "virtual_pipeline")
        if self.sequence and self.tensor == 1:
            raise FieldError(
                "sequence",
                True,
                "false when tensor is 1",
                "set parallel.sequence=false or parallel.tensor=2",
            )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(kw_only=True, frozen=True, slots=True)
class MegatronConfig:
    """Settings handed to Megatron-Core as they are; `check` knows its names, with their types."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig (recompute, fusions...)."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig (overlap_grad_reduce, overlap_param_gather...)."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of OptimizerConfig."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SFPOConfig:
    """Slow-Fast Policy Optimization (arXiv 2510.04072); defaults are the released reference's."""

    num_fast_passes: int = 3
    """K: passes over the batch before the reposition; 0 is plain GRPO."""
    trajectory: Literal["real", "predicted"] = "real"
    """real: SFPO's K passes; predicted: PrePO's (arXiv 2605.06755), two passes, from which the rest
    of the K is predicted, coordinate by coordinate: 3 passes a step with the slow correction,
    whatever K is, and 4 more bytes a parameter of the shard. Set moments: restore with it."""
    alpha: float = 0.8
    """Position of the weights between the snapshot (0) and the fast point (1)."""
    entropy_window: int = 30
    """Train steps whose entropy the gate's z-score is taken over, the newest included."""
    entropy_zscore_threshold: float | None = 1.0
    """The gate closes at z >= this; null: at no z, which without entropy_relative_threshold leaves
    it open."""
    entropy_relative_threshold: float | None = None
    """The gate also closes where entropy is above its window's mean by this share of that mean;
    null: by the z-score alone."""
    entropy_patience: int = 1
    """Train steps in a row that have to cross a threshold; the window waits for them."""
    entropy_window_excludes_newest: bool = False
    """Compare with the window before the newest step. Inside its own window a value is at most
    sqrt(entropy_window - 1) deviations from the mean, and raises both."""
    entropy_warmup_steps: int = 0
    """Train steps at the start whose entropy the gate does not see."""
    trigger: Literal["one_sided", "two_sided"] = "one_sided"
    """one_sided: entropy rises (the released code); two_sided: it moves either way (the paper's
    Algorithm 1)."""
    latch: bool = True
    """True: once closed, closed for good."""
    stop_step: int | None = None
    """Close the gate at this train step whatever the entropy does; null for never."""
    moments: Literal["keep", "restore", "reset"] = "keep"
    """Adam's moments and step count at the reposition: keep leaves them as the fast passes made
    them, restore puts back the snapshot's (8 more bytes a parameter), reset zeroes them."""
    snapshot: Literal["device", "host"] = "device"
    """Place of the slow weights: beside the main params, or in host memory, which frees 4
    bytes a parameter of the shard on the device and costs one copy of the shard over PCIe a step;
    not with moments: restore."""

    def __post_init__(self) -> None:
        at_least(self, 0, "num_fast_passes", "stop_step")
        within(self, 0.0, 1.0, "alpha")
        within(self, 2, 1_000_000, "entropy_window")
        at_least(self, 1, "entropy_patience")
        at_least(self, 0, "entropy_warmup_steps")
        positive(self, "entropy_relative_threshold")
        if self.trajectory == "predicted":
            self._check_prediction()
        warmup = self.entropy_warmup_steps
        if warmup and self.stop_step is not None and self.stop_step <= warmup:
            raise FieldError(
                "entropy_warmup_steps",
                warmup,
                f"fewer than stop_step ({self.stop_step}), which closes the gate before it has "
                "seen any entropy",
                "shorten the warm-up, or set stop_step to null",
            )
        if self.snapshot == "host" and self.moments == "restore":
            raise FieldError(
                "snapshot",
                self.snapshot,
                "device with moments: restore",
                "set snapshot to device, or moments to keep or reset: restore holds two more "
                "copies of the shard's size on the device, so moving the third away saves little",
            )

    @property
    def real_fast_passes(self) -> int:
        """Fast passes that a step makes: two if the trajectory is predicted from them."""
        return self.num_fast_passes if self.trajectory == "real" else min(self.num_fast_passes, 2)

    def _check_prediction(self) -> None:
        if self.num_fast_passes == 1:
            raise FieldError(
                "num_fast_passes",
                1,
                "2 or more with trajectory: predicted (0: plain GRPO)",
                "set the passes of the predicted trajectory, or trajectory to real",
            )
        if self.snapshot == "host":
            raise FieldError(
                "snapshot",
                self.snapshot,
                "device with trajectory: predicted",
                "set snapshot to device: the prediction holds the weights after the first pass "
                "there, and those of the snapshot are read beside them",
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """Held-out accuracy, also taken before the first step and after the last."""

    every: int = 10
    """Train steps between evaluations; 0 for only the first and the last."""
    n: int = 1
    """Rollouts per prompt (avg@n)."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    max_response_tokens: int | None = None
    """Generation stops here; null for rollout.max_response_tokens."""
    stop_at: float | None = None
    """End the run, saved and exported, once an evaluation's accuracy (of several sources, their
    average) has reached this; null for never."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every")
        if self.stop_at is not None:
            within(self, 0.0, 1.0, "stop_at")
        within(self, 0.0, 2.0, "temperature")
        positive(self, "top_p")
        within(self, 0.0, 1.0, "top_p")
        at_least(self, 1, "n", "max_response_tokens")


@dataclass(kw_only=True, frozen=True, slots=True)
class SamplesConfig:
    """Sample rollouts to look at, on the console, in output_dir/samples.jsonl and other sinks."""

    every: int = 0
    """Train steps between samples, the first step included; 0 for never."""
    num_prompts: int = 2
    """Prompts of each time, with all their responses."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every")
        at_least(self, 1, "num_prompts")


@dataclass(kw_only=True, frozen=True, slots=True)
class TrackingConfig:
    """The sinks of the metrics."""

    sinks: tuple[Annotated[str, SINK], ...] = ("console", "jsonl")
    """console: a progress line; jsonl: output_dir/metrics.jsonl; tensorboard, wandb, mlflow: those
    services (docs/outputs.md)."""
    project: str = "sfpo-megatron"
    """Project of wandb, experiment of mlflow."""
    run_name: str | None = None
    """Name of the run there; null for the last part of output_dir."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    def __post_init__(self) -> None:
        known(self, SINK, "sinks")
        if (twice := first_repeated(self.sinks)) is not None:
            raise FieldError("sinks", list(self.sinks), "each sink once", f"remove one {twice}")


@dataclass(kw_only=True, frozen=True, slots=True)
class DebugConfig:
    """Each half of the loop on its own."""

    save_rollouts: str | None = None
    """Write every rollout batch into this file (safetensors)."""
    rollout_only: bool = False
    """Generate and score, train nothing."""
    train_only: str | None = None
    """Train on the rollout batches of this file, with no engine."""

    def __post_init__(self) -> None:
        if self.rollout_only and self.train_only:
            raise FieldError("rollout_only", True, "false with train_only", "unset one of the two")


@dataclass(kw_only=True, frozen=True, slots=True)
class RunConfig:
    """One run."""

    seed: int = 0
    """Seeds data order, sampling and initialisation."""
    output_dir: str
    """Everything the run writes."""
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sfpo: SFPOConfig = field(default_factory=SFPOConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    data: DataConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        at_least(self, 0, "seed")
        if self.seed >= 2**32:
            raise FieldError("seed", self.seed, "a number below 2**32", "take a smaller seed")

    @property
    def rewards(self) -> tuple[RewardChoice | None, ...]:
        """The reward of each source; None: reward.function."""
        return tuple(source.reward for source in (*self.data.train, *self.data.eval))

    @property
    def drawn_per_step(self) -> int:
        """Prompts that a train step draws, in its first round."""
        return math.ceil(self.train.prompts_per_step * self.rollout.oversample)

    @property
    def saves_state(self) -> bool:
        """Whether there are checkpoints, and a stop request therefore saves."""
        return self.checkpoint.every > 0 and not self.debug.rollout_only

    @property
    def num_engine_gpus(self) -> int:
        """GPUs that are the engines' alone."""
        if self.rollout.placement == "colocated" or self.debug.train_only is not None:
            return 0
        return self.rollout.num_engine_ranks

    @property
    def eval_response_tokens(self) -> int:
        """Response tokens at which an evaluation cuts."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def engine_tokens(self) -> int:
        """The longest sequence of an engine: prompt and response, of training or evaluation."""
        longest = max(self.rollout.max_response_tokens, self.eval_response_tokens)
        return self.rollout.max_prompt_tokens + longest
