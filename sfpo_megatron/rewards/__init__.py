"""Verifiable rewards: one verifier a file, found by the name in `reward.function`.

A verifier is a module with `score(response, prompt) -> float` in [0, 1]. It raises only when it
or the prompt is broken; a response it can make nothing of scores 0. Models write the responses,
so a run scores them in `pool.ScoringPool`'s processes, never in its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

VERIFIERS = {
    "reasoning_gym": "sfpo_megatron.rewards.reasoning_gym",
    "exact_match": "sfpo_megatron.rewards.exact_match",
    "last_number": "sfpo_megatron.rewards.last_number",
    "math": "sfpo_megatron.rewards.math",
    "math_boxed": "sfpo_megatron.rewards.math_boxed",
}
"""reward.function -> the module; imported when asked for."""


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


Verifier = Callable[[str, Problem], float]


def verifier_module(name: str) -> str:
    """The module of the verifier that `reward.function` names."""
    if name not in VERIFIERS:
        raise ValueError(
            f"reward.function: found {name!r}, expected one of {', '.join(VERIFIERS)}; "
            "choose one of them"
        )
    return VERIFIERS[name]


def load_verifier(module_name: str) -> Verifier:
    """The module's `score`, after its `warm_up()` if it has one (slow imports)."""
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    verifier: Verifier = module.score
    return verifier
