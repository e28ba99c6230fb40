"""What an evaluation found: JSON for programs, Markdown for papers, a table for the terminal.

OUT/results.json    every figure: models, their sources, differences to the first model
OUT/results.md      the same as tables
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfpo_megatron.evaluation.figures import Sample, difference, figures
from sfpo_megatron.evaluation.records import Record
from sfpo_megatron.host.replacing import write_durably
from sfpo_megatron.outputs.table import aligned

ALL = "all"
"""Name of the problems of all sources together, where there are several."""
AVERAGE = "average"
"""Name of the mean over sources, each counted alike: what papers report of six benchmarks."""

Problems = Mapping[str, Sequence[Sample]]


def by_source(problems: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, list[Sample]]]:
    """Source -> problem -> samples."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for problem, records in problems.items():
        samples = [
            Sample(
                correct=record["correct"],
                answer=record["answer"],
                num_tokens=record["num_tokens"],
                truncated=record["truncated"],
            )
            for record in records
        ]
        found.setdefault(records[0]["source"], {})[problem] = samples
    return found if len(found) == 1 else {_apart(source): one for source, one in found.items()}


def _apart(source: str) -> str:
    """Its name beside the figures of several sources: one that is called as these are is `all#0`,
    and no source is called so by itself."""
    return f"{source}#0" if source in (ALL, AVERAGE) else source


def results(models: Mapping[str, Mapping[str, Sequence[Record]]]) -> dict[str, Any]:
    """Model name -> records by problem, as the figures of results.json."""
    sources = {name: by_source(records) for name, records in models.items()}
    first = next(iter(sources))
    return {
        "models": {name: _of_model(found) for name, found in sources.items()},
        "differences": {
            name: {
                source: asdict(difference(found[source], sources[first][source]))
                for source in found
            }
            | (
                {ALL: asdict(difference(_all(found), _all(sources[first])))}
                if _several(found)
                else {}
            )
            for name, found in sources.items()
            if name != first
        },
    }


def _of_model(sources: Mapping[str, Problems]) -> dict[str, Any]:
    each = {source: figures(problems) for source, problems in sources.items()}
    if not _several(sources):
        return {source: asdict(found) for source, found in each.items()}
    average = sum(found.accuracy for found in each.values()) / len(each)
    # Sources are independent: the error of a mean of means.
    stderr = math.sqrt(sum(found.stderr**2 for found in each.values())) / len(each)
    return {
        **{source: asdict(found) for source, found in each.items()},
        ALL: asdict(figures(_all(sources))),
        AVERAGE: {"accuracy": average, "stderr": stderr},
    }


def _several(sources: Mapping[str, Problems]) -> bool:
    return len(sources) > 1


def _all(sources: Mapping[str, Problems]) -> dict[str, Sequence[Sample]]:
    return {name: samples for problems in sources.values() for name, samples in problems.items()}


def write(directory: Path, found: Mapping[str, Any]) -> None:
    """results.json and results.md, each whole or not at all."""
    text = json.dumps(_plain(found), indent=1, allow_nan=False) + "\n"
    write_durably(directory / "results.json", text)
    write_durably(directory / "results.md", markdown(found))


def _plain(value: Any) -> Any:
    """NaN, the error of a single problem, is null in JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of a model each, of pass@k, and of the differences between models."""
    parts = []
    for title, header, rows in _tables(found):
        lines = [header, ["---"] * len(header), *rows]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in lines]
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells))
    return "\n".join(parts)


def table(found: Mapping[str, Any]) -> str:
    """The same tables with aligned columns."""
    parts = []
    for title, header, rows in _tables(found):
        parts.append(f"{title}\n{aligned([header, *rows])}")
    return "\n".join(parts)


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    for name, sources in found["models"].items():
        whole = {source: one for source, one in sources.items() if "n" in one}
        n = next(iter(whole.values()))["n"]
        header = ["", "problems", f"avg@{n}", f"maj@{n}", "tokens", "cut off"]
        rows = [
            [
                source,
                str(one["num_problems"]),
                _percent(one["accuracy"], one["stderr"]),
                _percent(one["majority"]),
                f"{one['mean_tokens']:.0f}",
                _percent(one["truncated"]),
            ]
            for source, one in whole.items()
        ]
        if AVERAGE in sources:
            one = sources[AVERAGE]
            rows.append([AVERAGE, "", _percent(one["accuracy"], one["stderr"]), "", "", ""])
        yield name, header, rows
        if n > 1:
            ks = [k for k in range(1, n + 1) if k == n or k & (k - 1) == 0]
            yield (
                f"{name}: pass@k",
                ["", *(f"k = {k}" for k in ks)],
                [[s, *(_percent(one["pass_at"][k]) for k in ks)] for s, one in whole.items()],
            )
    for name, sources in found["differences"].items():
        yield (
            f"{name} less {next(iter(found['models']))}",
            ["", "points", "95 % interval"],
            [
                [
                    source,
                    f"{100 * one['mean']:+.1f} ± {_error(one['stderr'])}",
                    f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}",
                ]
                for source, one in sources.items()
            ],
        )


def _percent(share: float, stderr: float | None = None) -> str:
    text = f"{100 * share:.1f}"
    return text if stderr is None else f"{text} ± {_error(stderr)}"


def _error(stderr: float) -> str:
    return "?" if math.isnan(stderr) else f"{100 * stderr:.1f}"
