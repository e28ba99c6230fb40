"""The table at the end of a run: where it started, where it ended, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfpo_megatron.outputs.metrics import RunMetrics, read_metrics
from sfpo_megatron.types import Json

PHASES = ("generate", "reward", "logprob", "passes", "reposition", "refit", "step")


def summary_table(metrics_path: str | Path, *, resumed_after: int | None = None) -> str:
    """A plain aligned table of a run's metrics.jsonl. `resumed_after`: the train step whose
    checkpoint the run continued from, if it did."""
    run = read_metrics(metrics_path)
    if not run.train and not run.evals:
        return f"{metrics_path}: no train step and no evaluation yet\n"
    parts = [_progress(run), _counts(run, resumed_after), _seconds(run)]
    return "\n".join(part for part in parts if part) + "\n"


def _progress(run: RunMetrics) -> str:
    rows: list[Sequence[str]] = []
    for label, name, lines in (
        ("held-out accuracy", "eval/accuracy", run.evals),
        ("train reward", "reward_mean", run.train),
        ("train accuracy", "accuracy", run.train),
        ("entropy (nats)", "entropy", run.train),
    ):
        points = run.series(name, lines)
        if points:
            best = "" if name == "entropy" else _at(max(points, key=lambda point: point[1]))
            rows.append((label, _at(points[0]), _at(points[-1]), best))
    return aligned([("", "start", "end", "best"), *rows]) if rows else ""


def _counts(run: RunMetrics, resumed_after: int | None) -> str:
    if not run.train:
        return ""
    last = run.train[-1]
    gate = run.gate_close_step
    rows = [
        ("train steps", f"{len(run.train):,}"),
        ("rollouts", f"{last['num_rollouts']:,}"),
        ("optimizer steps", _count(last.get("num_optimizer_steps"))),
        ("skipped steps", _count(last.get("num_skipped_steps"))),
        ("gate closed at step", "never" if gate is None else str(gate)),
    ]
    if resumed_after is not None:
        rows.append(("resumed after step", str(resumed_after)))
    return aligned(rows)


def _seconds(run: RunMetrics) -> str:
    rows: list[Sequence[str]] = []
    means = {phase: _mean(run, f"time/{phase}_s") for phase in PHASES}
    step = means["step"]
    for phase, mean in means.items():
        if mean is None:
            continue
        share = f"{mean / step:.0%}" if step and phase != "step" else ""
        rows.append((phase, f"{mean:.3f}", share))
    return aligned([("mean seconds", "", "of a step"), *rows]) if rows else ""


def _mean(run: RunMetrics, name: str) -> float | None:
    values = [value for _, value in run.series(name, run.train)]
    return sum(values) / len(values) if values else None


def _at(point: tuple[int, float]) -> str:
    return f"{point[1]:.3f} (step {point[0]})"


def _count(value: Json) -> str:
    return f"{value:,}" if isinstance(value, int) else "n/a"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
