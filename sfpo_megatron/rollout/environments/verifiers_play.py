"""An environment of the verifiers package plays the episode: `rollout.environment: verifiers:NAME`.

Written for verifiers 0.4 (its `verifiers.v1`). Its programs ask its own interception server, which
asks the endpoint; the trace that it keeps of a program names the session.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.agents import verifiers_args
from sfpo_megatron.data.verifiers_tasks import INDEX
from sfpo_megatron.plugins import Foreign
from sfpo_megatron.rollout.endpoint.server import MODEL
from sfpo_megatron.rollout.environments.endpoint_environment import EndpointEnvironment
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY_VARIABLE = "SFPO_ROLLOUT_API_KEY"
"""The package reads keys from the environment, and keeps such names from its programs."""
_START_S, _END_S = 300.0, 30.0


class VerifiersEnvironment(EndpointEnvironment):
    """Tasks, programs and rewards are the package's."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        chat_template_args: Mapping[str, Any] | None = None,
        **environment_args: Any,
    ) -> None:
        """`environment_args`: the fields of `config.agents.VerifiersArgs`. Starts what the
        environment's programs share."""
        from verifiers.v1.clients import EvalClientConfig, ModelContext
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        args = verifiers_args(environment_args)
        taskset = {**args.env.get("taskset", {}), "id": name}
        self._env: Any = load_environment(resolve_env_config({**args.env, "taskset": taskset}))
        self._coming: Iterator[Any] = iter(self._env.taskset)
        self._tasks: list[Any] = []
        super().__init__(
            tokenizer, args, name=f"verifiers:{name}", chat_template_args=chat_template_args
        )
        os.environ[KEY_VARIABLE] = self._endpoint.shared_key
        client = EvalClientConfig(base_url=self._endpoint.base_url, api_key_var=KEY_VARIABLE)
        self._policy = ModelContext(model=MODEL, client=client)
        self._serving = AsyncExitStack()
        self._agents.call(self._start(), timeout_s=_START_S)

    async def play(self, api_key: str, prompt: Prompt, seed: int) -> Foreign:
        """The rewards of all programs that played, summed, and their metrics."""

        def began(trace: Any) -> None:
            self._endpoint.also(api_key, trace.id)

        task = self._task(prompt.metadata.get(INDEX))
        episode = await self._env.run_episode(task, self._policy, on_trace=began)
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if errors:
            raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}")
        found = [trace.metrics for trace in episode.traces]
        return {
            **{name: x for metrics in found for name, x in metrics.items() if x is not None},
            "reward": sum(trace.reward for trace in episode.traces),
        }

    def close(self) -> None:
        """End the environment, then the endpoint."""
        self._agents.call(self._serving.aclose(), timeout_s=_END_S)
        super().close()

    async def _start(self) -> None:
        await self._serving.enter_async_context(self._env.serving())

    def _task(self, index: Foreign) -> Any:
        if not isinstance(index, int):
            raise ValueError(
                f"found a prompt that is no task of {self._name}, expected data.train and "
                'data.eval with source "sfpo_megatron.data.verifiers_tasks:rows" and its name'
            )
        missing = index + 1 - len(self._tasks)
        self._tasks += itertools.islice(self._coming, max(0, missing))
        return self._tasks[index]
