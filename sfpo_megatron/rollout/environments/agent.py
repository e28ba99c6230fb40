"""A function of the user's own plays the episode: `rollout.environment: agent`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.agents import agent_args
from sfpo_megatron.plugins import AGENT, Foreign, PluginError
from sfpo_megatron.rollout.environments.endpoint_environment import EndpointEnvironment
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AgentEnvironment(EndpointEnvironment):
    """Calls the function that the settings name."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_args: Mapping[str, Any] | None = None,
        **environment_args: Any,
    ) -> None:
        """`environment_args`: the fields of `config.agents.AgentArgs`."""
        args = agent_args(environment_args)
        self._agent, self._agent_args = _loaded(args.agent, args.agent_args), args.agent_args
        super().__init__(tokenizer, args, name=args.agent, chat_template_args=chat_template_args)

    async def play(self, api_key: str, prompt: Prompt, seed: int) -> Foreign:
        return await self._agent(self._endpoint.base_url, api_key, prompt, seed, **self._agent_args)


def _loaded(name: str, arguments: Mapping[str, Any]) -> Any:
    """The agent; PluginError unless it is an `async def` that takes the arguments."""
    agent = AGENT.load(name)
    if not inspect.iscoroutinefunction(agent):
        raise PluginError(
            AGENT.key, found=f"{name}, which is no `async def`", expected=AGENT.form,
            fix="make it one",
        )  # fmt: skip
    try:
        inspect.signature(agent).bind("base_url", "api_key", "prompt", "seed", **arguments)
    except TypeError as error:
        raise PluginError(
            "rollout.environment_args.agent_args",
            found=f"{', '.join(arguments)}, with which {name} cannot be called ({error})",
            expected="its keyword arguments",
            fix=f"correct the names, or give {name} these parameters",
        ) from error
    return agent
