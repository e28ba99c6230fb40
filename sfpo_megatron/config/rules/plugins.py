"""Rules of check.py about a user's own code: looked up, and nothing of it run. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.reward import RewardChoice
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import (
    ADVANTAGE,
    BATCHED_REWARD,
    ENVIRONMENT,
    LOSS,
    REWARD,
    SINK,
    SOURCE,
    Kind,
    PluginError,
)


def own_code(config: RunConfig) -> Iterator[Problem]:
    """Each `package.module:name` is there and can be called as it will be."""
    for kind, name, key in _named(config):
        try:
            kind.find(name, key=key)
        except PluginError as error:
            yield Problem(error.key, error.found, error.expected, error.fix)


def _named(config: RunConfig) -> Iterator[tuple[Kind, str, str]]:
    """(kind, name, key) of everything that may be a user's own."""
    for kind, name in (
        (LOSS, config.objective.loss),
        (ADVANTAGE, config.objective.advantage),
        (ENVIRONMENT, config.rollout.environment),
        *((SINK, name) for name in config.tracking.sinks),
    ):
        yield kind, name, kind.key
    yield from _rewards(config, config.reward.function, REWARD.key)
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            key = f"data.{part}.{index}"
            yield SOURCE, source.source, f"{key}.source"
            if source.reward is not None:
                yield from _rewards(config, source.reward, f"{key}.reward")


def _rewards(config: RunConfig, choice: RewardChoice, key: str) -> Iterator[tuple[Kind, str, str]]:
    for index, one in enumerate(config.reward.summands(choice)):
        where = key if isinstance(choice, str) else f"{key}.{index}.name"
        yield BATCHED_REWARD if one.batched else REWARD, one.name, where
