"""Selective rollouts: prompts that gave nothing to learn from lately are mostly passed over.

A group whose rewards are all equal has advantages of zero, and what a prompt's last group was is a
good guess at its next one. So a prompt whose last z groups were all solved, or all failed, is drawn
with probability p^z alone (GRESO, arXiv 2506.02177, sections 4.1 and 4.2), one p for solved and one
for failed ones. Each is moved a little after every step, towards a wanted share of such groups
among those that are generated: the more there are, the more are passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Protocol

Outcome = Literal["solved", "failed", "mixed"]
"""A group's: all rewards equal and all correct; all equal otherwise; not all equal."""

_FIRST, _LOWEST, _HIGHEST, _STEP = 0.5, 0.05, 0.95, 0.01
"""How the base p moves (GRESO's own values)."""
_RARELY = 0.01  # no prompt is passed over for ever: the policy changes
_SOLVED_SHARE = 1 / 3  # of the wanted share; the rest is for failed ones, which may yet be learned


class History(Protocol):
    """What is known of the prompts' groups."""

    def keeps(self, prompt_id: str, draw: float) -> bool:
        """Whether the prompt is drawn, given a number between 0 and 1."""

    def observe(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take in the groups of one step: prompt id -> outcome."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """How rare prompts without variance are made now."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved state."""


class NoHistory:
    """Every prompt is drawn."""

    metrics: Mapping[str, float] = {}

    def keeps(self, prompt_id: str, draw: float) -> bool:
        """Yes."""
        return True

    def observe(self, outcomes: Mapping[str, Outcome]) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Whatever an earlier part of the run knew is let go."""


class ZeroVarianceHistory:
    """Passes over prompts whose last groups had all rewards equal."""

    def __init__(self, target: float) -> None:
        """`target`: the wanted share of groups without variance among those generated."""
        self._target: dict[Outcome, float] = {
            "solved": target * _SOLVED_SHARE,
            "failed": target * (1 - _SOLVED_SHARE),
        }
        self._base: dict[Outcome, float] = {"solved": _FIRST, "failed": _FIRST}
        self._streaks: dict[str, int] = {}
        """Prompt id -> its last groups in a row that were solved, or minus those that failed."""

    def keeps(self, prompt_id: str, draw: float) -> bool:
        """Whether the prompt is drawn, given a number between 0 and 1."""
        return draw < self.probability(prompt_id)

    def probability(self, prompt_id: str) -> float:
        """Chance that the prompt is drawn: 1 if it is new, or its last group had variance."""
        streak = self._streaks.get(prompt_id, 0)
        if streak == 0:
            return 1.0
        base = self._base["solved" if streak > 0 else "failed"]
        return max(base ** abs(streak), _RARELY)

    def observe(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take in the groups of one step: prompt id -> outcome."""
        if not self._streaks.keys().isdisjoint(outcomes):  # else nothing was passed over yet
            counts = Counter(outcomes.values())
            for kind, wanted in self._target.items():
                too_many = counts[kind] / len(outcomes) >= wanted
                moved = self._base[kind] + (-_STEP if too_many else _STEP)
                self._base[kind] = round(min(max(moved, _LOWEST), _HIGHEST), 10)
        for prompt_id, outcome in outcomes.items():
            streak = self._streaks.get(prompt_id, 0)
            if outcome == "mixed":
                self._streaks[prompt_id] = 0
            elif outcome == "solved":
                self._streaks[prompt_id] = max(streak, 0) + 1
            else:
                self._streaks[prompt_id] = min(streak, 0) - 1

    @property
    def metrics(self) -> Mapping[str, float]:
        """How rare prompts without variance are made now."""
        return {f"explore_{kind}": base for kind, base in self._base.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"base": dict(self._base), "streaks": dict(self._streaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved state; one of a run that kept no history begins here."""
        if state:
            for kind in self._base:
                self._base[kind] = float(state["base"][kind])
            self._streaks = {name: int(streak) for name, streak in state["streaks"].items()}
