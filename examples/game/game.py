"""Higher or lower: a user knows a number, the model has a few guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sfpo_megatron.rollout.environments.conversation import Conversation, Told
from sfpo_megatron.rollout.episodes import Episode
from sfpo_megatron.types import Prompt


class HigherLower(Conversation):
    """`prompt.answer` is the number; an episode is worth 1 if it was found."""

    async def respond(self, prompt: Prompt, turns: Sequence[str]) -> Told:
        """What the user says to a guess; nothing to the right one."""
        said = reply(turns[-1], int(prompt.answer))
        return Told(messages=[{"role": "user", "content": said}] if said else [])

    def finish(self, prompt: Prompt, episode: Episode, turns: Sequence[str]) -> Episode:
        found = not reply(turns[-1], int(prompt.answer))
        wasted = sum(reply(turn, int(prompt.answer)) == "A number, please." for turn in turns)
        metrics = {**episode.metrics, "found": float(found), "no_number": float(wasted)}
        return replace(episode, reward=float(found), metrics=metrics)


def reply(turn: str, number: int) -> str:
    """`higher`, `lower`, or nothing where the guess is right."""
    guess = turn.strip()
    if not (guess.isascii() and guess.isdigit()):
        return "A number, please."
    return "" if int(guess) == number else "higher" if int(guess) < number else "lower"
