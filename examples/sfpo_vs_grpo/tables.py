"""Tables of docs/results.md, and the words in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from saved import Outcome


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Its lines."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def interval(bounds: tuple[float, float], digits: int = 2) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def hardware(runs: Iterable[Outcome]) -> list[str]:
    """The machines that made the runs."""
    return sorted({run.about["hardware"] for run in runs})


def made_with(runs: Iterable[Outcome], machines: Sequence[str]) -> str:
    """The commits that made the runs of a row; with their machines, where the task's runs were made
    on several."""
    found = set()
    for run in runs:
        commit, *changed = run.about["commit"].split("-", 1)  # "-dirty"
        words = "-".join([commit[:7], *changed])
        found.add(words if len(machines) == 1 else f"{words} on {run.about['hardware']}")
    return ", ".join(sorted(found)) or "-"
