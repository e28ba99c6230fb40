"""The objective's sections of the config tree; docs/objectives.md says which loss is which keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sfpo_megatron.config.fields import FieldError, at_least, known, positive, within
from sfpo_megatron.plugins import ADVANTAGE, LOSS


@dataclass(kw_only=True, frozen=True, slots=True)
class OverlongConfig:
    """Rollouts that come close to rollout.max_response_tokens, or are cut there (DAPO)."""

    mask_truncated: bool = False
    """Leave rollouts that were cut out of the loss and of its normalizer; their rewards still count
    in their group."""
    buffer_tokens: int = 0
    """Soft penalty: over the last this many tokens below the limit the reward falls linearly by
    `penalty`; 0 turns it off."""
    penalty: float = 1.0
    """What a rollout as long as the limit loses."""

    def __post_init__(self) -> None:
        at_least(self, 0, "buffer_tokens", "penalty")


@dataclass(kw_only=True, frozen=True, slots=True)
class KLConfig:
    """Penalty on KL(policy || reference); the reference has the weights of model.path."""

    coef: float = 0.0
    """Weight of the KL term; 0: there is none, and no reference policy is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate, with d = log of reference / policy: -d, d^2 / 2, or exp(d) - 1 - d."""
    where: Literal["loss", "reward"] = "loss"
    """loss: a term of every token, of the policy as it moves; reward: the sum over a rollout's
    tokens, before the update, is taken off its reward."""

    @property
    def in_reward(self) -> bool:
        """Whether it is taken off the rewards, before the update."""
        return self.coef > 0 and self.where == "reward"

    def __post_init__(self) -> None:
        at_least(self, 0, "coef")


@dataclass(kw_only=True, frozen=True, slots=True)
class ImportanceSamplingConfig:
    """Correction for the gap between the engine's and the trainer's probabilities: weights on the
    policy loss, from old_logprobs - generator_logprobs."""

    weight: Literal["none", "token", "sequence"] = "none"
    """Truncated importance sampling: the token's ratio, or the product of them over the response,
    but at most max_weight."""
    max_weight: float = 2.0
    """Upper bound of the weight."""
    reject: Literal["none", "token", "sequence"] = "none"
    """Weight 0 for a token whose ratio is outside [low, high] (IcePop, with weight token), or for a
    rollout whose geometric mean ratio is."""
    low: float = 0.5
    """Lower bound of `reject`."""
    high: float = 2.0
    """Upper bound of `reject`."""

    @property
    def is_on(self) -> bool:
        return self.weight != "none" or self.reject != "none"

    def __post_init__(self) -> None:
        positive(self, "max_weight")
        within(self, 0.0, 1.0, "low")
        at_least(self, 1, "high")


@dataclass(kw_only=True, frozen=True, slots=True)
class ObjectiveConfig:
    """The policy objective of every pass; docs/objectives.md has the formulas."""

    advantage: Annotated[str, ADVANTAGE] = "grpo"
    """grpo: (reward - group mean) / (group std + 1e-6); rloo: reward - mean of the others;
    reinforce_pp: (reward - group mean) / (std of that over the whole batch + 1e-6); or your own."""
    advantage_args: dict[str, Any] = field(default_factory=dict)
    """Settings of an advantage of your own."""
    normalize_std: bool = True
    """grpo only: divide by the group's unbiased standard deviation (false: Dr.GRPO)."""
    zero_variance_groups: Literal["keep", "mask"] = "keep"
    """Groups whose rollouts all got the same reward; mask: out of the loss and its normalizer."""
    ratio: Literal["token", "sequence"] = "token"
    """token: new / old probability of each token; sequence: their geometric mean over the response
    (GSPO)."""
    loss: Annotated[str, LOSS] = "ppo_clip"
    """The policy loss of a token, built in or your own."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Settings of a loss of your own."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """ppo_clip only: with a negative advantage the loss is at most this times |advantage|."""
    aggregation: Literal[
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"
    ] = "token_mean"
    """How token losses become a minibatch's loss. Counts are over microbatches and data-parallel
    ranks: sum / response tokens; mean over rollouts of their token means; of their token sums; of
    their token sums / rollout.max_response_tokens (Dr.GRPO)."""
    old_logprobs: Literal["trainer", "generator"] = "trainer"
    """The denominator of the ratio. trainer: its own log-probs under the weights before the update,
    a forward of all minibatches but the first; generator: what the engine sampled with, no forward
    (docs/objectives.md)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    importance_sampling: ImportanceSamplingConfig = field(default_factory=ImportanceSamplingConfig)

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "clip_low")
        at_least(self, 0, "clip_high", "entropy_coef")
        at_least(self, 1, "dual_clip")
        known(self, ADVANTAGE, "advantage")
        known(self, LOSS, "loss")
        for kind, name in ((ADVANTAGE, "advantage"), (LOSS, "loss")):
            chosen, args = getattr(self, name), getattr(self, f"{name}_args")
            if args and chosen in kind.built_in:
                raise FieldError(
                    f"{name}_args",
                    args,
                    f"nothing with {name} {chosen}",
                    "remove it, or name your own",
                )
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise FieldError(
                "dual_clip", self.dual_clip, f"null with loss {self.loss}", "set it to null"
            )
