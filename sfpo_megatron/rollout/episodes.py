"""The environment seam: how a prompt becomes an episode, by calls for generations.

    environment = Class(tokenizer, **environment_args)           once, in the controller's process
    episode = await environment.run(prompt, generate, seed)      once a rollout, many at a time

`rollout.environment` names the class; docs/extend.md describes one of your own. `SingleTurn`, the
built-in one, asks once for each rollout, and for all rollouts of an engine call together.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import ENVIRONMENT, PluginError
from sfpo_megatron.rollout.sampling import Completion
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True, frozen=True, slots=True)
class Episode:
    """One rollout before it is scored. Grown turn by turn: `Episode().then(completion)`, then
    `.told(token_ids)` for what the environment says, `.then(...)` for what the model answers."""

    token_ids: tuple[int, ...] = ()  # [R], all that follows the prompt
    logprobs: tuple[float, ...] = ()  # [R], the engine's; anything where response_mask is False
    response_mask: tuple[bool, ...] = ()  # [R], True where the model generated the token
    finished: bool = False
    """True: it ended by itself; False: it was cut."""
    reward: float | None = None
    """The environment's own; None: reward.function scores the text from `scored_from` on."""
    turn_rewards: float = 0.0
    """Sum of the rewards of single turns, which is added to either; `correct` does not see it."""
    scored_from: int = 0
    """The first response token whose text reward.function gets: a later one leaves out what came
    before an answer."""
    prompt_token_ids: tuple[int, ...] = ()
    """What the model was given in place of the prompt; empty: the prompt itself."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Logged as `environment/NAME`: the mean over the train step's rollouts that have it."""

    def then(self, completion: Completion, *, reward: float = 0.0) -> Episode:
        """The model goes on with `completion`: trained on. `reward`: that of this turn."""
        return replace(
            self,
            token_ids=(*self.token_ids, *completion.token_ids),
            logprobs=(*self.logprobs, *completion.logprobs),
            response_mask=(*self.response_mask, *(True for _ in completion.token_ids)),
            finished=completion.finished,
            turn_rewards=self.turn_rewards + reward,
        )

    def told(self, token_ids: Sequence[int]) -> Episode:
        """The environment goes on with `token_ids`: read by the model, not trained on."""
        return replace(
            self,
            token_ids=(*self.token_ids, *map(int, token_ids)),
            logprobs=(*self.logprobs, *(0.0 for _ in token_ids)),
            response_mask=(*self.response_mask, *(False for _ in token_ids)),
            finished=False,
        )

    def cut_to(self, limit: int) -> Episode:
        """At most `limit` response tokens; one that had more did not finish."""
        if len(self.token_ids) <= limit:
            return self
        return replace(
            self,
            token_ids=self.token_ids[:limit],
            logprobs=self.logprobs[:limit],
            response_mask=self.response_mask[:limit],
            finished=False,
        )


class Generate(Protocol):
    """Asks an engine."""

    context_tokens: int
    """Most tokens of the prompt and the episode together."""
    temperature: float
    """Temperature of the request, an evaluation's own; 0 is greedy."""
    top_p: float
    """Nucleus of the request."""

    def __call__(
        self, token_ids: Sequence[int], *, seed: int | None = None, max_tokens: int | None = None
    ) -> Awaitable[Completion]:
        """What the model says after `token_ids`, usually the prompt's and the episode's so far.

        seed: by default the rollout's own for its first call, one made of it for each later call.
        max_tokens: fewer than the room that rollout.max_response_tokens leaves beside the prompt.
        Where it leaves none, the completion is empty and not finished.
        """
        ...

    def branch(self, number: int) -> Generate:
        """The same with call numbers, and so seeds, of its own, for what runs beside other calls:
        the order in which those of several branches come is the engines'."""
        ...


class Environment(Protocol):
    """What `rollout.environment` names; made with the tokenizer and rollout.environment_args. A
    method `close(self)`, if it has one, is called when the run ends."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One rollout. The seed is its own: the same in a run that is repeated."""
        ...


GenerateAll: TypeAlias = Callable[
    [Sequence[tuple[int, ...]], Sequence[int]], Awaitable[list[Completion]]
]
"""(token ids of each, seed of each) -> completions, by one call of one engine."""


@runtime_checkable
class BatchEnvironment(Protocol):
    """An environment whose rollouts all have one generation: an engine takes many in one call."""

    async def run_batch(
        self, prompts: Sequence[Prompt], generate: GenerateAll, seeds: Sequence[int]
    ) -> list[Episode]:
        """One rollout for each (prompt, seed)."""
        ...


class SingleTurn:
    """The built-in environment: the response is what the model says after the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """It has no use for the tokenizer."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One generation."""
        return Episode().then(await generate(prompt.token_ids, seed=seed))

    async def run_batch(
        self, prompts: Sequence[Prompt], generate: GenerateAll, seeds: Sequence[int]
    ) -> list[Episode]:
        """The same for several rollouts."""
        completions = await generate([prompt.token_ids for prompt in prompts], seeds)
        return [Episode().then(completion) for completion in completions]


def load_environment(name: str) -> Callable[..., Environment]:
    """The class that `rollout.environment` names, to be called with the tokenizer and its own
    arguments; PluginError if there is none such."""
    loaded = ENVIRONMENT.load(name)
    run = getattr(loaded, "run", None)
    if not _is_run(run):
        raise PluginError(
            ENVIRONMENT.key,
            found=f"{name} without an `async def run(self, prompt, generate, seed)`",
            expected=ENVIRONMENT.form,
            fix="give the class that method",
        )
    return loaded


def make_environment(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Environment:
    """The environment of a run. A class with `uses_chat_template = True` gets `chat_template_args`:
    data.chat_template_args, so that later turns are written as prompts are."""
    arguments = dict(config.rollout.environment_args)
    kind = load_environment(config.rollout.environment)
    if getattr(kind, "uses_chat_template", False):
        arguments["chat_template_args"] = config.data.chat_template_args
    return kind(tokenizer, **arguments, **_named(config.rollout.environment))


def check_environment(config: RunConfig) -> None:
    """Raise PluginError unless there is such a class, which takes rollout.environment_args and has
    the chat template that it uses."""
    name, arguments = config.rollout.environment, config.rollout.environment_args
    kind = load_environment(name)
    try:
        inspect.signature(kind).bind("tokenizer", **arguments, **_named(name))
    except TypeError as error:
        raise PluginError(
            "rollout.environment_args",
            found=f"{', '.join(arguments)}, with which {name} cannot be made ({error})",
            expected="its keyword arguments",
            fix=f"correct the names, or give {name}'s __init__ these parameters",
        ) from error
    if getattr(kind, "uses_chat_template", False) and not config.data.chat_template:
        raise PluginError(
            "data.chat_template",
            found=f"false with rollout.environment {name}",
            expected="true: the chat template writes the turns",
            fix="set it",
        )


def _named(environment: str) -> dict[str, str]:
    """What one class that stands for many environments is told."""
    rest = ENVIRONMENT.rest_of(environment)
    return {"name": rest} if rest else {}


def _is_run(method: Any) -> bool:
    if not inspect.iscoroutinefunction(method):
        return False
    try:
        inspect.signature(method).bind("self", "prompt", "generate", "seed")
    except TypeError:
        return False
    return True
