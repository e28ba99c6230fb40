"""Rules of check.py about environments that a program of the user's own plays. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from sfpo_megatron.config.agents import AGENT_ENVIRONMENT, agent_args, verifiers_args
from sfpo_megatron.config.environments import KEY
from sfpo_megatron.config.origin import ConfigError
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import AGENT, ENVIRONMENT, PluginError


def agent(config: RunConfig) -> Iterator[Problem]:
    """The agent is there, its settings are known, and nothing is promised that it cannot keep."""
    rollout = config.rollout
    is_agent = rollout.environment == AGENT_ENVIRONMENT
    if not is_agent and not ENVIRONMENT.rest_of(rollout.environment):
        return
    if rollout.reproducible:
        yield Problem(
            "rollout.reproducible",
            f"true with rollout.environment {rollout.environment}",
            "false: when an agent asks is its own affair, and so is which calls form a batch",
            "set it to false, or write the environment as a class of your own",
        )
    if not config.data.chat_template:
        yield Problem(
            "data.chat_template",
            f"false with rollout.environment {rollout.environment}",
            "true: the chat template writes what is said to the model",
            "set it",
        )
    if not is_agent and find_spec("verifiers") is None:
        yield Problem(
            ENVIRONMENT.key,
            f"{rollout.environment}, and no package verifiers in this Python",
            "verifiers to play it with",
            "pip install 'sfpo-megatron[verifiers]'",
            "error_here",
        )
    try:
        if is_agent:
            AGENT.find(agent_args(rollout.environment_args).agent, key=f"{KEY}.agent")
        else:
            verifiers_args(rollout.environment_args)
    except (ConfigError, PluginError) as error:
        yield Problem(error.key, error.found, error.expected, error.fix)
