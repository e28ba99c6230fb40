"""The config tree: one frozen dataclass a section, every default stated once, here,
in objective.py, rollout.py, reward.py or checkpoint.py.

Ordered as the data walks (docs/configuration.md). No torch: a login node validates a run with it.
A field that is wrong on its own is refused at construction with `FieldError`; what needs two
sections or the model's files is refused by `check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sfpo_megatron.config.checkpoint import CheckpointConfig
from sfpo_megatron.config.fields import FieldError, at_least, known, positive, within
from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.reward import (
    RewardChoice,
    RewardConfig,
    WeightedReward,
    check_choice,
)
from sfpo_megatron.config.rollout import RefitConfig, RolloutConfig
from sfpo_megatron.plugins import REWARD, SINK, SOURCE


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
    """How the trainer's ranks are laid out; their product is the world size."""

    data: int | None = 1
    """Data-parallel size; null takes world size / (tensor x pipeline)."""
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
    """Fields of TransformerConfig (recompute, fusions, FP8...)."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig (overlap_grad_reduce, overlap_param_gather...)."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of OptimizerConfig."""


@dataclass(kw_only=True, frozen=True, slots=True)
class OptimizerSection:
    """Adam with decoupled weight decay, as Megatron builds it."""

    lr: float = 1.0e-6
    """Learning rate; it ticks once per train step, whatever the number of passes."""
    lr_warmup_steps: int = 0
    """Train steps of linear warm-up from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's exponential decay rates."""
    eps: float = 1.0e-8
    """Adam's denominator term."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 turns it off."""

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay", "clip_grad", "lr_warmup_steps")
        positive(self, "eps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("betas", self.betas, "two numbers in [0, 1)", "use [0.9, 0.999]")


@dataclass(kw_only=True, frozen=True, slots=True)
class TrainConfig:
    """One train step: its rollout batch and how it is cut."""

    num_steps: int = 100
    """Train steps (rollout batches) of the run."""
    prompts_per_step: int = 32
    """Prompts in one rollout batch."""
    group_size: int = 8
    """Rollouts per prompt; the group that a GRPO advantage is taken in."""
    minibatches_per_step: int = 2
    """Optimizer steps per pass."""
    microbatch_size: int | None = None
    """Rollouts per microbatch; null packs up to max_tokens_per_microbatch, as evenly in work
    (attention and linear layers) as can be."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one packed forward on a rank."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits are turned into fp32 at a time in the log-prob kernel."""
    control_timeout_s: float = 1800.0
    """How long ranks wait on rank 0 (generation included) before the run is ended."""
    max_logprob_diff: float | None = None
    """Stop the run, saved, where logprob_diff_mean of rollouts by the trainer's own weights is more
    than this; null only warns of more than the dtype allows."""
    stop_after_skipped_steps: int | None = 10
    """Stop the run, saved, after so many train steps in a row without a finite loss, or without an
    optimizer step that was made; null for never. While float16 lowers its loss scale, skipped steps
    do not count."""
    stop_after_zero_reward_steps: int | None = 100
    """Stop the run, saved, after so many train steps in a row whose rewards are all 0 at an entropy
    below 0.01 nats; null for never. Not where rewards below 0 have been seen."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)

    def __post_init__(self) -> None:
        at_least(
            self, 1, "num_steps", "prompts_per_step", "minibatches_per_step", "microbatch_size"
        )
        at_least(self, 1, "max_tokens_per_microbatch", "logprob_chunk_tokens")
        at_least(self, 1, "stop_after_skipped_steps", "stop_after_zero_reward_steps")
        at_least(self, 2, "group_size")
        positive(self, "control_timeout_s", "max_logprob_diff")
        if self.prompts_per_step % self.minibatches_per_step:
            raise FieldError(
                "prompts_per_step",
                self.prompts_per_step,
                f"a multiple of minibatches_per_step ({self.minibatches_per_step})",
                "change one of the two",
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class SFPOConfig:
    """Slow-Fast Policy Optimization (arXiv 2510.04072); defaults are the released reference's."""

    num_fast_passes: int = 3
    """K: passes over the batch before the reposition; 0 is plain GRPO."""
    alpha: float = 0.8
    """Position of the weights between the snapshot (0) and the fast point (1)."""
    entropy_window: int = 30
    """Train steps whose entropy the gate's z-score is taken over, the newest included."""
    entropy_zscore_threshold: float = 1.0
    """The gate closes at z >= this."""
    trigger: Literal["one_sided", "two_sided"] = "one_sided"
    """one_sided: entropy rises; two_sided: it moves either way."""
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
        at_least(self, 2, "entropy_window")
        if self.snapshot == "host" and self.moments == "restore":
            raise FieldError(
                "snapshot",
                self.snapshot,
                "device with moments: restore",
                "set snapshot to device, or moments to keep or reset: restore holds two more "
                "copies of the shard's size on the device, so moving the third away saves little",
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class DataSource:
    """One source of prompts."""

    source: Annotated[str, SOURCE]
    """reasoning_gym: a seeded generator; jsonl, parquet: rows with `prompt` and `answer`, or with
    verl's columns."""
    task: str | None = None
    """reasoning_gym: the generator's name, such as chain_sum."""
    args: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the generator's settings; your own source: whatever it reads here."""
    size: int | None = None
    """reasoning_gym: problems to make; else rows to take (null for all)."""
    path: str | None = None
    """jsonl, parquet: the file; your own source: whatever it reads."""
    reward: Annotated[str, REWARD] | tuple[WeightedReward, ...] | None = None
    """Scores the responses to this source's prompts; null for reward.function."""

    def __post_init__(self) -> None:
        known(self, SOURCE, "source")
        check_choice(self, "reward")
        at_least(self, 1, "size")
        files = ("path",)
        needed = {"reasoning_gym": ("task", "size"), "jsonl": files, "parquet": files}
        for name in needed.get(self.source, ()):
            if getattr(self, name) is None:
                raise FieldError(name, None, f"a value for source {self.source}", f"set {name}")


@dataclass(kw_only=True, frozen=True, slots=True)
class DataConfig:
    """Prompts to train and to evaluate on; a question of `eval` is never trained on."""

    train: tuple[DataSource, ...]
    """Mixed, shuffled by the run's seed, repeated when used up."""
    eval: tuple[DataSource, ...] = ()
    """Held-out prompts."""
    chat_template: bool = False
    """Wrap each prompt as a user message in the tokenizer's chat template."""
    prompt_suffix: str = ""
    """Appended to every prompt's text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed or too long row: end with its file and line, or skip and count it."""
    skip_zero_variance: bool = False
    """Pass over prompts whose last groups had all rewards equal, the more of them the more often:
    selective rollouts (GRESO, arXiv 2506.02177). They stay in the data, and come again."""
    zero_variance_target: float = 0.25
    """Share of such groups that skip_zero_variance aims at, among those generated; a third of it
    for solved prompts, two thirds for failed ones."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "zero_variance_target")
        if not self.train:
            raise FieldError("train", [], "at least one source", "add a source under data.train")


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

    def __post_init__(self) -> None:
        at_least(self, 0, "every")
        within(self, 0.0, 2.0, "temperature")
        positive(self, "top_p")
        within(self, 0.0, 1.0, "top_p")
        at_least(self, 1, "n", "max_response_tokens")


@dataclass(kw_only=True, frozen=True, slots=True)
class SFTConfig:
    """The warm start: next-token loss on prompt, answer, end-of-sequence of data.train."""

    num_steps: int = 100
    """Optimizer steps."""
    examples_per_step: int = 64
    """Examples in one optimizer step."""
    lr: float = 1.0e-3
    """Peak learning rate: warm-up over a tenth of the steps, cosine decay to a tenth of it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "examples_per_step")
        positive(self, "lr")


@dataclass(kw_only=True, frozen=True, slots=True)
class TrackingConfig:
    """The sinks of the metrics."""

    sinks: tuple[Annotated[str, SINK], ...] = ("console", "jsonl")
    """console: a progress line; jsonl: output_dir/metrics.jsonl."""

    def __post_init__(self) -> None:
        known(self, SINK, "sinks")
        twice = [name for name in self.sinks if self.sinks.count(name) > 1]
        if twice:
            raise FieldError("sinks", list(self.sinks), "each sink once", f"remove one {twice[0]}")


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
    def saves_state(self) -> bool:
        """Whether there are checkpoints, and a stop request therefore saves."""
        return self.checkpoint.every > 0 and not self.debug.rollout_only

    @property
    def eval_response_tokens(self) -> int:
        """Response tokens at which an evaluation cuts."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def engine_tokens(self) -> int:
        """The longest sequence of an engine: prompt and response, of training or evaluation."""
        longest = max(self.rollout.max_response_tokens, self.eval_response_tokens)
        return self.rollout.max_prompt_tokens + longest
