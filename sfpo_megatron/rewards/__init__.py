"""Verifiable rewards: one built-in verifier a file, or a function of the user's own.

`plugins.REWARD` lists them; `reward.function` chooses. A verifier is `score(response, prompt)`,
which gives a number in [0, 1] or a mapping with `reward` and other numbers to log. It raises only
when it or the prompt is broken; a response it can make nothing of scores 0. Models write the
responses, so a run scores them in `pool.ScoringPool`'s processes, never in its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sfpo_megatron.errors import WrongInput


class Problem(Protocol):
    """What a verifier may look at: of `types.Prompt`, the fields that go to a scoring process."""

    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class VerifierError(RuntimeError):
    """A verifier cannot score whatever the response: a bug or a bad row, not a reward."""


class CannotBeJudged(Exception):
    """The machine cannot do now what a verdict takes: no response's fault, and no reward."""


class WrongReward(VerifierError, WrongInput):
    """A reward cannot be used as it is given: a function that does not load, a server without an
    address."""
