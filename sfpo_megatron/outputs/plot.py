"""The picture of a run: accuracy against rollouts, the entropy with its gate, the drift."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.outputs.metrics import RunMetrics, read_metrics
from sfpo_megatron.outputs.report.curves import SMOOTHING, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOFTWARE = "sfpo-megatron"
"""What a picture's own metadata say of who has drawn it; matplotlib would name itself."""
_SIGNED = b"tEXtSoftware\0" + SOFTWARE.encode()
_BLUE, _GREY, _ORANGE, _GREEN = "#1f5fa8", "#9aa3ad", "#d9722b", "#2f8f6b"


def plot(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw a run's metrics.jsonl into a PNG (no display is needed). ValueError where there is
    nothing to draw, or a file that was not drawn here stands in its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png_path = Path(png_path)
    if os.path.lexists(png_path) and not is_drawn(png_path):
        raise ValueError(
            f"{png_path}: found a file that is not marked as {SOFTWARE}'s, expected one that is "
            "(0.1.0 marked none) or none; move it away"
        )
    run = read_metrics(metrics_path)
    if not run.train and not run.evals:
        raise ValueError(f"{metrics_path}: no train step and no evaluation to draw")
    # Figure and canvas without pyplot: no global state, whatever backend the user has chosen.
    figure = Figure(figsize=(9.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2.2, 1, 1])
    _accuracy(top, run)
    _entropy(middle, run)
    _drift(bottom, run)
    bottom.set_xlabel("rollouts")
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    close = run.gate_close_step
    for axes in (top, middle, bottom):
        if close is not None:
            axes.axvline(run.rollouts_at(close - 1), color=_ORANGE, linewidth=1, linestyle="--")
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    with replacing(png_path) as aside:
        figure.savefig(aside, dpi=140, format="png", metadata={"Software": SOFTWARE})


def is_drawn(file: Path) -> bool:
    """Whether `plot` has drawn this file: the picture says it before its pixels."""
    if not file.is_file() or file.is_symlink():
        return False
    with file.open("rb") as stream:
        return _SIGNED in stream.read(4096)


def _xy(run: RunMetrics, name: str, *, evals: bool = False) -> tuple[list[int], list[float]]:
    points = run.series(name, run.evals if evals else run.train)
    return [run.rollouts_at(step) for step, _ in points], [value for _, value in points]


def _noisy(axes: Axes, run: RunMetrics, name: str, color: str, label: str) -> None:
    """Draw faint points as logged and a line for their running mean."""
    x, y = _xy(run, name)
    if not x:
        return
    axes.plot(x, y, ".", color=color, alpha=0.35, markersize=4)
    axes.plot(x, running_mean([*y], SMOOTHING), color=color, linewidth=1.4, label=label)


def _accuracy(axes: Axes, run: RunMetrics) -> None:
    _noisy(axes, run, "reward_mean", _GREY, "train reward")
    x, y = _xy(run, "eval/accuracy", evals=True)
    if x:
        axes.plot(x, y, "o-", color=_BLUE, linewidth=2, markersize=5, label="held-out accuracy")
        for index, above in ((0, -14), (-1, 8)):
            axes.annotate(
                f"{y[index]:.1%}",
                (x[index], y[index]),
                textcoords="offset points",
                xytext=(0, above),
                ha="left" if index == 0 else "right",
                color=_BLUE,
                fontweight="bold",
            )
    axes.set_title(_title(run), loc="left", fontsize=11)
    axes.set_ylabel("accuracy, reward")
    axes.margins(y=0.12)
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns of an empty one
        axes.legend(loc="lower right", frameon=False)


def _title(run: RunMetrics) -> str:
    steps = len(run.train)
    updates = run.train[-1].get("num_optimizer_steps") if run.train else None
    text = f"{steps} train steps"
    return text + (f", {updates:,} optimizer steps" if isinstance(updates, int) else "")


def _entropy(axes: Axes, run: RunMetrics) -> None:
    x, y = _xy(run, "entropy")
    axes.plot(x, y, color=_GREEN, linewidth=1.4)
    axes.set_ylabel("entropy (nats)")
    close = run.gate_close_step
    if close is not None:
        axes.annotate(
            f"gate closes (step {close})",
            (run.rollouts_at(close - 1), 1.0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(5, -10),
            color=_ORANGE,
            fontsize=9,
        )


def _drift(axes: Axes, run: RunMetrics) -> None:
    _noisy(axes, run, "clip_frac", _ORANGE, "clipped tokens")
    axes.set_ylabel("clip fraction")
    axes.set_ylim(bottom=0)
