"""A loss of your own: the ratio is bounded above only, at a setting; how often is logged."""

from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.surrogate import PolicyTokens


def loss(tokens: PolicyTokens, config: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    bound = config.loss_args.get("max_ratio", 2.0)
    losses = -tokens.ratio.clamp(max=bound) * tokens.advantages
    return losses, {"bounded": tokens.ratio > bound}
