"""What an objective finds, by name: added up on this rank, then over all ranks.

Only ranks of the last pipeline stage call the objective, and all ranks take part in the
reductions of its rows of numbers. So the names are agreed once, when a pass first meets an
objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.objectives.objective import OF_EVERY_PASS, Objective, ObjectiveTerms

_FIRST = 2  # the loss and the entropy come first in every row


@dataclass(kw_only=True, frozen=True, slots=True)
class Names:
    """Names of an objective's statistics, in the order of a row."""

    sums: tuple[str, ...]
    maxima: tuple[str, ...]

    def __post_init__(self) -> None:
        names = (*self.sums, *self.maxima, *OF_EVERY_PASS)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"the objective's statistics: found {', '.join(twice)} a second time, expected "
                "each name once among sums, maxima and what every pass logs "
                f"({', '.join(sorted(OF_EVERY_PASS))}); rename it"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class Found:
    """What the objective found in one microbatch."""

    names: Names
    row: Tensor  # [2 + sums + maxima] where the model is: loss, entropy sum, then as named


@dataclass(kw_only=True, frozen=True, slots=True)
class Totals:
    """What this rank found in one minibatch, float64."""

    names: tuple[Names, ...]
    """One, or none off the last pipeline stage."""
    sums: Tensor  # [2 + sums]
    maxima: Tensor  # [maxima]


@dataclass(kw_only=True, frozen=True, slots=True)
class Reduced:
    """What all ranks found in one minibatch: sums over the tokens under the loss masks, and maxima
    over them."""

    loss: float
    entropy: float
    sums: dict[str, float]
    maxima: dict[str, float]


def found_in(terms: ObjectiveTerms, entropy_sum: Tensor) -> Found:
    """One row of numbers, so that one copy a microbatch leaves the device."""
    values = (terms.loss.detach(), entropy_sum, *terms.sums.values(), *terms.maxima.values())
    return Found(
        names=Names(sums=tuple(terms.sums), maxima=tuple(terms.maxima)),
        row=torch.stack([value.float() for value in values]),
    )


def add_up(found: Sequence[Found], *, counts: bool) -> Totals:
    """Totals of one minibatch's microbatches. `counts`: whether this rank's numbers are for the
    total; tensor-parallel ranks hold the same ones."""
    names = tuple(dict.fromkeys(one.names for one in found))
    if len(names) > 1:
        raise _other_names(names[1], names[0], "an earlier microbatch")
    num_sums = _FIRST + sum(len(n.sums) for n in names)
    sums = torch.zeros(num_sums, dtype=torch.float64)
    maxima = torch.zeros(sum(len(n.maxima) for n in names), dtype=torch.float64)
    for one in found if counts else ():
        row = one.row.double().cpu()
        sums += row[:num_sums]
        maxima = torch.maximum(maxima, row[num_sums:])
    return Totals(names=names, sums=sums, maxima=maxima)


class Statistics:
    """Reduces the totals of passes over all ranks."""

    def __init__(self, control: ControlGroup) -> None:
        self._control = control
        self._agreed: list[tuple[Objective, Names]] = []  # of the objective in use

    def reduce(self, objective: Objective, totals: Sequence[Totals]) -> list[Reduced]:
        """The same on every rank, for each minibatch. Collective: one reduction of the sums, one of
        the maxima where there are any, and for a new objective a gathering of the names."""
        names = self._names(objective, [n for total in totals for n in total.names])
        sums = torch.zeros(len(totals), _FIRST + len(names.sums), dtype=torch.float64)
        maxima = torch.zeros(len(totals), len(names.maxima), dtype=torch.float64)
        for i, total in enumerate(totals):
            if total.names:
                sums[i], maxima[i] = total.sums, total.maxima
        sums = self._control.sum(sums)
        if names.maxima:
            maxima = self._control.max(maxima)
        return [
            Reduced(
                loss=loss,
                entropy=entropy,
                sums=dict(zip(names.sums, rest, strict=True)),
                maxima=dict(zip(names.maxima, highest, strict=True)),
            )
            for (loss, entropy, *rest), highest in zip(sums.tolist(), maxima.tolist(), strict=True)
        ]

    def _names(self, objective: Objective, mine: Sequence[Names]) -> Names:
        """Names of the objective's statistics, on every rank. Collective the first time."""
        known = [names for other, names in self._agreed if other is objective]
        if not known:
            first = [[list(names.sums), list(names.maxima)] for names in mine[:1]]
            gathered = self._control.all_gather_json(first)
            known = [
                Names(sums=tuple(sums), maxima=tuple(maxima))
                for of_rank in gathered
                for sums, maxima in of_rank
            ]
            for rank_names in known[1:]:
                if rank_names != known[0]:
                    raise _other_names(rank_names, known[0], "another rank")
            self._agreed = [(objective, known[0])]
        for names in mine:
            if names != known[0]:
                raise _other_names(names, known[0], "an earlier pass")
        return known[0]


def _other_names(found: Names, before: Names, where: str) -> ValueError:
    def text(names: Names) -> str:
        return ", ".join((*names.sums, *names.maxima)) or "none"

    return ValueError(
        f"statistics of the objective (objective.loss among it): found {text(found)}, expected "
        f"the names of {where} ({text(before)}); give every statistic in every microbatch, 0 where "
        "it says nothing"
    )
