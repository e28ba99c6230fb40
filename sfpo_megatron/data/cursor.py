"""The place of a run in its prompts: an epoch, how far it has come in it, and its order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sfpo_megatron.data.order import epoch_length, epoch_order, shares_of
from sfpo_megatron.data.reasoning_gym import derived_seed


class Cursor:
    """Deals out indices of prompts, epoch after epoch.

    A batch never straddles two epochs (it could hold a prompt twice): the few prompts that are
    left when fewer than a batch remain are passed over, others in each epoch.
    """

    def __init__(self, seed: int, counts: Sequence[int], weights: Sequence[float]) -> None:
        """`counts`: prompts of each source, which stand one source after the other."""
        self._seed = seed
        self._counts = counts
        self._weights = list(weights)
        self._epoch, self._position = 0, 0
        self._own_order: list[int] = []  # of this epoch, where it is not the shuffle
        self._order = self._shuffled(0)
        self._num_skipped = 0

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, from 0, and how many prompts of it have been drawn."""
        return self._epoch, self._position

    @property
    def length(self) -> int:
        """How many prompts an epoch has."""
        return epoch_length(self._counts, self._weights)

    def next_batch(self, num_prompts: int, keeps: Callable[[int, float], bool]) -> list[int]:
        """Indices of the next batch: those of which `keeps(index, draw)` says yes, `draw` in [0, 1)
        being the same in every run of this seed. Fewer prompts than a batch at the end of an epoch
        are left out with it, as they are where all are kept."""
        begun_at = self._position
        while True:
            if self._position + num_prompts > len(self._order):
                self._epoch, self._position, begun_at = self._epoch + 1, 0, 0
                self._own_order = []
                self._order = self._shuffled(self._epoch)
            chosen: list[int] = []
            skipped: list[int] = []
            for index in self._order[self._position :]:
                draw = random.Random(derived_seed("skip", self._seed, self._epoch, index)).random()
                (chosen if keeps(index, draw) else skipped).append(index)
                self._position += 1
                if len(chosen) == num_prompts:
                    break
            if begun_at == 0:  # if it was all of the epoch, some come that should be passed over
                missing = num_prompts - len(chosen)
                chosen, skipped = chosen + skipped[:missing], skipped[missing:]
            self._num_skipped += len(skipped)
            if len(chosen) == num_prompts:
                return chosen

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; an order or weights only where they are not what every run has."""
        changing: dict[str, Any] = {"order": self._own_order} if self._own_order else {}
        if len(set(self._weights)) > 1:
            changing["weights"] = self._weights
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "skipped": self._num_skipped,
            **changing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved place among the same prompts; weights may have changed, from the next
        epoch on."""
        self._own_order = list(state.get("order", ()))
        saved = list(state.get("weights", ())) or [1.0] * len(self._weights)
        if not self._own_order and shares_of(saved) != shares_of(self._weights):
            self._own_order = epoch_order(self._seed, state["epoch"], self._counts, saved)
        self._go_to(state)

    def carry_over(
        self,
        state: Mapping[str, Any],
        counts: Sequence[int],
        place: Mapping[int, int],
        added: Sequence[int],
    ) -> None:
        """Continue at a saved place among other prompts. `counts`: prompts of each source then;
        `place`: index then -> index now, of those that are still there; `added`: indices of new
        ones, which come last in this epoch."""
        epoch, position = int(state["epoch"]), int(state["position"])
        weights = list(state.get("weights", ())) or [1.0] * len(counts)
        order = list(state.get("order", ())) or epoch_order(self._seed, epoch, counts, weights)
        drawn = [place[row] for row in order[:position] if row in place]
        rest = [place[row] for row in order[position:] if row in place]
        new = list(added)
        random.Random(derived_seed("added", self._seed, epoch)).shuffle(new)
        self._own_order = [*drawn, *rest, *new]
        self._go_to({**state, "position": len(drawn)})

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self._epoch = int(state["epoch"])
        self._order = self._own_order or self._shuffled(self._epoch)
        self._position = min(int(state["position"]), len(self._order))
        self._num_skipped = int(state.get("skipped", 0))  # versions before had none

    def _shuffled(self, epoch: int) -> list[int]:
        return epoch_order(self._seed, epoch, self._counts, self._weights)
