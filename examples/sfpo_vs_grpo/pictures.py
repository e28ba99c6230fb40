"""Pictures of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from saved import Outcome

_COLORS = ("#9aa3ad", "#2f8f6b", "#d9722b", "#1f5fa8", "#8a4fbf")


def curves(found: dict[str, list[Outcome]], threshold: float, picture: Path, *, title: str) -> None:
    """Mean held-out accuracy against rollouts, with the band of all seeds."""
    figure = _figure(9, 4.6)
    axes = figure.subplots()
    for color, (arm, runs) in zip(_COLORS, found.items(), strict=False):
        length = min(len(run.evals) for run in runs)
        x = [rollouts for rollouts, _ in runs[0].evals[:length]]
        columns = [[run.evals[i][1] for run in runs] for i in range(length)]
        axes.plot(x, [mean(c) for c in columns], color=color, linewidth=2, label=arm)
        axes.fill_between(
            x, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15
        )
    axes.axhline(threshold, color="#555", linewidth=1, linestyle="--")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("rollouts")
    axes.set_ylabel("held-out accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(picture, dpi=140)


def heat_maps(
    panels: Mapping[str, Mapping[tuple[Any, Any], float]],
    rows: tuple[str, Sequence[Any]],
    columns: tuple[str, Sequence[Any]],
    picture: Path,
) -> None:
    """A map for each of `panels`, title -> (row, column) -> value; `rows` and `columns` are names
    and values of what varies. A place without a value stays blank."""
    import matplotlib

    figure = _figure(9, 4.2)
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values) in zip(places, panels.items(), strict=True):
        grid = [[values.get((row, column), math.nan) for column in columns[1]] for row in rows[1]]
        colors = matplotlib.colormaps["viridis"].with_extremes(bad="white")
        image = axes.imshow(grid, cmap=colors, origin="lower", aspect="auto")
        middle = (min(values.values()) + max(values.values())) / 2
        for (row, column), value in values.items():
            axes.text(
                columns[1].index(column), rows[1].index(row), f"{value:.3f}",
                ha="center", va="center", color="white" if value < middle else "black",
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=11)
        for axis, (name, ticks) in ((axes.yaxis, rows), (axes.xaxis, columns)):
            axis.set_label_text(name)
            axis.set_ticks(range(len(ticks)), [str(tick) for tick in ticks])
        figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(picture, dpi=140)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
