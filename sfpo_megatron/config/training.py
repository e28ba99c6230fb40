"""The sections `train` and `sft` of the config: how long, in what batches, at which rate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from sfpo_megatron.config.fields import FieldError, at_least, positive, within

Schedule = Literal["constant", "linear", "cosine", "wsd"]
NUM_STEPS = 100
"""Steps of a run that gives neither num_steps nor num_epochs."""


@dataclass(kw_only=True, frozen=True, slots=True)
class OptimizerSection:
    """Adam with decoupled weight decay, as Megatron builds it."""

    lr: float = 1.0e-6
    """Learning rate, the peak of its schedule; it ticks once per train step, whatever the number of
    passes."""
    lr_schedule: Schedule = "constant"
    """After the warm-up: constant; linear or cosine decay to lr_floor at the last train step; wsd:
    constant, then lr_decay_steps of linear decay to lr_floor."""
    lr_warmup_steps: int = 0
    """Train steps of linear warm-up from 0."""
    lr_floor: float = 0.0
    """Learning rate that linear, cosine and wsd end at."""
    lr_decay_steps: int | None = None
    """wsd: train steps of its decay; null for a tenth of all."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's exponential decay rates."""
    eps: float = 1.0e-8
    """Adam's denominator term."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 turns it off."""

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay", "clip_grad", "lr_warmup_steps", "lr_floor")
        positive(self, "eps")
        _decay(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("betas", self.betas, "two numbers in [0, 1)", "use [0.9, 0.999]")

    def warmup_of(self, num_steps: int) -> int:
        """`lr_warmup_steps`, of a run of `num_steps`."""
        return self.lr_warmup_steps


@dataclass(kw_only=True, frozen=True, slots=True)
class TrainConfig:
    """One train step: its rollout batch and how it is cut."""

    num_steps: int | None = None
    """Train steps (rollout batches) of the run; null for 100, or for what num_epochs comes to."""
    num_epochs: int | None = None
    """Instead of num_steps: how often the run goes through data.train, in whole batches."""
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
    below collapsed_entropy; null for never. Not where rewards below 0 have been seen."""
    collapsed_entropy: float = 0.01
    """Nats a token, for stop_after_zero_reward_steps: below it samples of a prompt are alike."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)

    def __post_init__(self) -> None:
        _one_length(self)
        at_least(self, 1, "num_steps", "num_epochs", "prompts_per_step", "minibatches_per_step")
        at_least(self, 1, "microbatch_size", "max_tokens_per_microbatch", "logprob_chunk_tokens")
        at_least(self, 1, "stop_after_skipped_steps", "stop_after_zero_reward_steps")
        at_least(self, 0, "collapsed_entropy")
        at_least(self, 2, "group_size")
        at_least(self, 1, "control_timeout_s")  # ranks have to meet in it
        positive(self, "max_logprob_diff")
        if self.prompts_per_step % self.minibatches_per_step:
            raise FieldError(
                "prompts_per_step",
                self.prompts_per_step,
                f"a multiple of minibatches_per_step ({self.minibatches_per_step})",
                "change one of the two",
            )
        _fits(self.optimizer, self.num_steps)

    @property
    def steps(self) -> int:
        """`num_steps` of a run that has been opened, where num_epochs has become a number."""
        if self.num_steps is None:
            raise RuntimeError("train.num_epochs is a number of steps once the data has been read")
        return self.num_steps

    @property
    def rollouts_per_minibatch(self) -> int:
        """Rollouts of one optimizer step, over all data-parallel ranks."""
        return self.prompts_per_step * self.group_size // self.minibatches_per_step

    def with_steps(self, num_steps: int) -> TrainConfig:
        """The same with a length in steps; FieldError if its schedule does not fit in."""
        return replace(self, num_steps=num_steps, num_epochs=None)


@dataclass(kw_only=True, frozen=True, slots=True)
class SFTConfig:
    """The warm start (docs/warm-start.md): next-token loss on what the rows of data.train teach, a
    worked `completion`, an `answer`, or the assistant's turns in `messages`."""

    num_steps: int | None = None
    """Optimizer steps; null for 100, or for what num_epochs comes to."""
    num_epochs: int | None = None
    """Instead of num_steps: how often each example is learned from."""
    examples_per_step: int = 64
    """Examples in one optimizer step; the loss is the mean over all their learned tokens."""
    max_tokens: int | None = None
    """Tokens of a whole example; a longer one is a bad row (data.on_bad_row). null: as many as a
    microbatch takes and the model has positions for."""
    lr: float = 1.0e-5
    """Peak learning rate; small random models take 1e-3 or more."""
    lr_schedule: Schedule = "cosine"
    """The learning rate after the warm-up, as in train.optimizer."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of linear warm-up from 0; null for a tenth of all."""
    lr_floor: float = 0.0
    """Learning rate that linear, cosine and wsd end at."""
    lr_decay_steps: int | None = None
    """wsd: optimizer steps of its decay; null for a tenth of all."""
    eval_every: int = 0
    """Optimizer steps between measurements of the held-out loss, also taken before the first and
    after the last; 0 for none. The best one's checkpoint is kept (checkpoint.keep_best)."""
    holdout: float = 0.0
    """Share of data.train's questions that are not learned from: the held-out loss is theirs; 0:
    that of the rows of data.eval."""
    stop_after_skipped_steps: int | None = 10
    """Stop the warm start, saved, after so many steps in a row without a finite loss, or whose
    optimizer step was skipped; as train.stop_after_skipped_steps."""

    def __post_init__(self) -> None:
        _one_length(self)
        at_least(self, 1, "num_steps", "num_epochs", "examples_per_step", "lr_decay_steps")
        at_least(self, 1, "stop_after_skipped_steps")
        at_least(self, 2, "max_tokens")
        at_least(self, 0, "lr_warmup_steps", "lr_floor", "eval_every")
        positive(self, "lr")
        within(self, 0.0, 0.9, "holdout")
        _decay(self)
        _fits(self, self.num_steps)
        if self.holdout and not self.eval_every:
            raise FieldError(
                "holdout",
                self.holdout,
                "0 with eval_every 0",
                "set eval_every to the steps between measurements of the held-out loss",
            )

    @property
    def steps(self) -> int:
        """`num_steps` of a run that has been opened, where num_epochs has become a number."""
        if self.num_steps is None:
            raise RuntimeError("sft.num_epochs is a number of steps once the data has been read")
        return self.num_steps

    def warmup_of(self, num_steps: int) -> int:
        """`lr_warmup_steps` as a number, of a run of `num_steps`."""
        return num_steps // 10 if self.lr_warmup_steps is None else self.lr_warmup_steps

    def with_steps(self, num_steps: int) -> SFTConfig:
        """The same with a length in steps; FieldError if its schedule does not fit in."""
        return replace(self, num_steps=num_steps, num_epochs=None)


def decay_steps(section: OptimizerSection | SFTConfig, num_steps: int) -> int:
    """Steps at the end of a run in which wsd decays."""
    given = section.lr_decay_steps
    return max(1, num_steps // 10) if given is None else given


def batches_in(num_epochs: int, num_prompts: int, per_batch: int) -> int:
    """Train steps that `num_epochs` come to: a batch never straddles two epochs."""
    return num_epochs * (num_prompts // per_batch)


def _one_length(section: TrainConfig | SFTConfig) -> None:
    """Exactly one of num_steps and num_epochs; without either, the default."""
    if section.num_steps is not None and section.num_epochs is not None:
        raise FieldError(
            "num_epochs",
            section.num_epochs,
            f"null with num_steps {section.num_steps}",
            "set one of the two, the other to null",
        )
    if section.num_steps is None and section.num_epochs is None:
        object.__setattr__(section, "num_steps", NUM_STEPS)


def _decay(section: OptimizerSection | SFTConfig) -> None:
    """A floor not above the peak, and a decay of its own for wsd alone."""
    at_least(section, 1, "lr_decay_steps")
    floor = section.lr_floor
    if floor > section.lr:
        raise FieldError("lr_floor", floor, f"at most lr ({section.lr:g})", "lower it, or raise lr")
    if section.lr_decay_steps is not None and section.lr_schedule != "wsd":
        raise FieldError(
            "lr_decay_steps",
            section.lr_decay_steps,
            f"null with lr_schedule {section.lr_schedule}, which decays to the last step",
            "unset it, or set lr_schedule to wsd",
        )


def _fits(schedule: OptimizerSection | SFTConfig, num_steps: int | None) -> None:
    """A schedule that decays has steps to do it in."""
    if num_steps is None or schedule.lr_schedule == "constant":
        return  # not known yet; or the run may end in its warm-up
    warmup = schedule.warmup_of(num_steps)
    decay = decay_steps(schedule, num_steps) if schedule.lr_schedule == "wsd" else 1
    if warmup + decay > num_steps:
        raise FieldError(
            "num_steps",
            num_steps,
            f"lr_warmup_steps ({warmup}) and a decay ({decay} or more) within them",
            "train longer, or lower lr_warmup_steps or lr_decay_steps",
        )
