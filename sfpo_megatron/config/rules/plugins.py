"""Rules of check.py about a user's own code: looked up, and nothing of it run. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import (
    ADVANTAGE,
    BATCHED_REWARD,
    ENVIRONMENT,
    LOSS,
    REWARD,
    Kind,
    PluginError,
)


def own_code(config: RunConfig) -> Iterator[Problem]:
    """Each `package.module:name` is there and can be called as it will be."""
    for kind, name in _named(config):
        try:
            kind.find(name)
        except PluginError as error:
            yield Problem(error.key, error.found, error.expected, error.fix)


def _named(config: RunConfig) -> Iterator[tuple[Kind, str]]:
    yield LOSS, config.objective.loss
    yield ADVANTAGE, config.objective.advantage
    yield BATCHED_REWARD if config.reward.batched else REWARD, config.reward.function
    yield ENVIRONMENT, config.rollout.environment
