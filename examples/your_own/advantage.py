"""An advantage of your own: how far a reward is above the median of its group."""

from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig


def advantages(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor:
    groups = rewards.view(-1, group_size)
    scale = config.advantage_args.get("scale", 1.0)
    return (scale * (groups - groups.median(dim=1, keepdim=True).values)).flatten()
