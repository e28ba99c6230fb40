"""The reward's section of the config tree, and what one reward is: a name, or a weighted sum.

docs/data-and-rewards.md says what is built in, docs/extend.md what your own function is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from sfpo_megatron.config.fields import (
    MOST_PROCESSES,
    FieldError,
    at_least,
    first_repeated,
    known,
    positive,
    within,
)
from sfpo_megatron.plugins import REWARD

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(kw_only=True, frozen=True, slots=True)
class WeightedReward:
    """One summand of a reward. The first of them decides what is correct."""

    name: Annotated[str, REWARD]
    """Scores a response, as in `reward.function`."""
    weight: float = 1.0
    """What its score is multiplied by; 0 only logs it."""
    batched: bool = False
    """Your own function takes lists, as with `reward.batched`."""

    def __post_init__(self) -> None:
        known(self, REWARD, "name")
        if self.batched and self.name in REWARD.names:
            raise _not_batched(self.name)


RewardChoice: TypeAlias = str | tuple[WeightedReward, ...]
"""One reward: the name of a function, or a weighted sum of several."""


def check_choice(section: DataclassInstance, name: str) -> None:
    """Raise FieldError unless the field is null, a name that is known, or a sum."""
    choice: RewardChoice | None = getattr(section, name)
    if isinstance(choice, str):
        known(section, REWARD, name)
    elif choice is not None:
        names = [one.name for one in choice]
        if (twice := first_repeated(names)) is not None:
            raise FieldError(name, names, "each function once", f"add the weights of {twice}")
        if not names:
            raise FieldError(name, [], "at least one function", "name one")


def _not_batched(function: str) -> FieldError:
    fix = "unset it, or name your own"
    return FieldError("batched", True, f"false with function {function}", fix)


@dataclass(kw_only=True, frozen=True, slots=True)
class HttpRewardConfig:
    """The server that scores for the function `http`."""

    url: str | None = None
    """Address to which batches are posted: http:// or https://."""
    timeout_s: float = 60.0
    """What the server may take for one batch, its whole answer included."""
    retries: int = 8
    """How often a batch is posted again, after pauses of 1, 2, 4... and at most 30 s, before the
    run ends: 0 for never."""
    concurrency: int = 4
    """Batches that are under way at a time."""
    batch_size: int = 64
    """Responses in one batch, at most."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")
        at_least(self, 0, "retries")
        within(self, 1, MOST_PROCESSES, "concurrency")
        at_least(self, 1, "batch_size")
        if self.url is not None and (why := _no_url(self.url)):
            raise FieldError("url", self.url, f"http://HOST:PORT/PATH or https://... ({why})", _URL)


_URL = "correct the address of your server"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


def pauses_s(retries: int, first_s: float = FIRST_PAUSE_S) -> Iterator[float]:
    """Seconds before each of so many retries."""
    pause_s = min(first_s, LONGEST_PAUSE_S)
    for _ in range(retries):
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _no_url(url: str) -> str | None:
    """Why an address cannot be used."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https"):
        return f"its scheme is {parts.scheme!r}"
    if not parts.hostname or port == 0:
        return "it names no host and port"
    if parts.username is not None:
        return "a name and a password would stand in RUN/config.yaml"
    if not url.isascii() or any(letter.isspace() for letter in url):
        return "a blank, or a letter that is not ASCII"
    return None


@dataclass(kw_only=True, frozen=True, slots=True)
class RewardConfig:
    """The verifiable reward."""

    function: Annotated[str, REWARD] | tuple[WeightedReward, ...] = "reasoning_gym"
    """Scores a response; docs/data-and-rewards.md describes what is built in. A list is a weighted
    sum, whose first function decides what is correct."""
    batched: bool = False
    """Your own function takes lists, of responses and of prompts, and gives a list."""
    thinking: Literal["strip", "require_closed", "ignore"] = "strip"
    """What a built-in function looks at of a response: all but `<think>...</think>` and what
    follows a `<think>` that is never closed; the same, and nothing without `</think>`; or all."""
    timeout_s: float = 2.0
    """A response that takes longer to score gets 0; a batch may take this for each of its
    responses."""
    num_workers: int = 1
    """Scoring processes."""
    http: HttpRewardConfig = field(default_factory=HttpRewardConfig)

    def __post_init__(self) -> None:
        check_choice(self, "function")
        positive(self, "timeout_s")
        within(self, 1, MOST_PROCESSES, "num_workers")
        if self.batched and not isinstance(self.function, str):
            fix = "write batched: true beside the name of each function that takes lists"
            raise FieldError("batched", True, "false with a list of functions", fix)
        if self.batched and self.function in REWARD.names:
            raise _not_batched(str(self.function))

    def summands(self, choice: RewardChoice | None) -> tuple[WeightedReward, ...]:
        """The functions of a reward; null: of reward.function. One that is only named takes lists
        as `batched` says, unless it is built in."""
        choice = self.function if choice is None else choice
        if not isinstance(choice, str):
            return choice
        batched = self.batched and choice not in REWARD.names
        return (WeightedReward(name=choice, batched=batched),)

    def functions(self, choices: Iterable[RewardChoice | None]) -> tuple[WeightedReward, ...]:
        """Every function that one of these rewards calls, once."""
        found = (one for choice in choices for one in self.summands(choice))
        return tuple({(one.name, one.batched): one for one in found}.values())
