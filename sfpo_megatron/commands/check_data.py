"""`sfpo-megatron check CONFIG --data`: what a run would read, source by source.

It reads by `RunData`, as a run does, so what is counted here is what a run counts. No torch but for
what transformers itself imports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import TypedDict

from sfpo_megatron.commands.starting import see_to_home
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.counted import SourceRows
from sfpo_megatron.data.errors import DataError, by_kind
from sfpo_megatron.data.references import References
from sfpo_megatron.data.run_data import RunData
from sfpo_megatron.data.table import PromptTable
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.launcher.failures import WRONG_INPUT_EXIT_CODE
from sfpo_megatron.launcher.rank import exit_code_of
from sfpo_megatron.outputs.percentiles import percentiles
from sfpo_megatron.outputs.table import aligned
from sfpo_megatron.plugins import PluginError

_PERCENTILES = (50, 90, 99)


class First(TypedDict):
    """The first prompt of a source."""

    id: str
    where: str
    """`FILE:LINE`, or the config key and the entry's number."""
    text: str
    token_ids: list[int]
    reference: str
    reference_read: dict[str, list[str]]
    """Built-in reward -> the readings of the reference."""


class Source(TypedDict):
    """What was found in a source."""

    name: str
    rows: int
    kept: int
    repeated: int
    held_out: int
    bad: dict[str, int]
    """What is wrong with a row -> how many."""
    tokens: dict[str, int]
    """p50, p90, p99 and max of the prompts' lengths, of those too that do not fit; empty without a
    prompt."""
    first: First | None


class Report(TypedDict):
    """All that `--json` prints."""

    tokenizer: str
    max_prompt_tokens: int
    train: list[Source]
    eval: list[Source]
    summary: str
    """What a run says of its data in its first lines."""
    error: str | None
    """Why a run would end before it starts."""


def check_data(config: RunConfig, *, as_json: bool) -> int:
    """Read and print; the exit code: 0, 2 for data that a run refuses, 1 where it is away."""
    see_to_home()
    try:
        with redirect_stdout(sys.stderr):  # libraries and a user's own source print what they like
            report = report_of(config)
    except (DataError, PluginError) as error:
        return _refused(str(error), exit_code_of(error))
    print(json.dumps(report) if as_json else "\n".join(_lines(report)), flush=True)
    return 0 if report["error"] is None else _refused(report["error"])


def report_of(config: RunConfig) -> Report:
    """Read every source. DataError or PluginError where one cannot be read, or gives no prompt."""
    data = RunData.read(config, load_tokenizer(config.model.path))
    prompts, references = data.prompts.prompts, References(config.reward)
    assert isinstance(prompts, PromptTable), "RunData reads rows to train on, not a warm start's"
    train = [_source(one, prompts, references) for one in data.prompts.sources]
    held_out = [_source(one, data.held_out, references) for one in data.held_out_sources]
    error = None
    try:
        data.bad.settle()
        data.prompts.hold_batch(config.drawn_per_step)
    except DataError as refusal:
        error = str(refusal)
    return Report(
        tokenizer=config.model.path,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        train=train,
        eval=held_out,
        summary=data.summary,
        error=error,
    )


def _source(counted: SourceRows, prompts: PromptTable, references: References) -> Source:
    place = next((i for i, row in enumerate(prompts.rows) if row.source == counted.name), None)
    return Source(
        name=counted.name,
        rows=counted.rows,
        kept=counted.kept,
        repeated=counted.repeated,
        held_out=counted.held_out,
        bad=dict(counted.bad),
        tokens=percentiles(prompts.lengths(counted.name), *_PERCENTILES),
        first=None if place is None else _first(prompts, place, references),
    )


def _first(prompts: PromptTable, place: int, references: References) -> First:
    row, prompt = prompts.rows[place], prompts[place]
    return First(
        id=prompt.id,
        where=row.where,
        text=prompt.text,
        token_ids=list(prompt.token_ids),
        reference=row.answer,
        reference_read=references.read(row),
    )


def _lines(report: Report) -> Iterator[str]:
    """The report for a person."""
    sources = [*report["train"], *report["eval"]]
    counted = ("rows", "kept", "repeated", "held out", "bad")
    lengths = (*(f"p{p}" for p in _PERCENTILES), "max")
    rows = [
        (
            one["name"],
            *(f"{number:,}" for number in (one["rows"], one["kept"], one["repeated"])),
            *(f"{number:,}" for number in (one["held_out"], sum(one["bad"].values()))),
            *(f"{one['tokens'][name]:,}" if one["tokens"] else "" for name in lengths),
        )
        for one in sources
    ]
    yield aligned([("", *counted, *lengths), *rows])
    limit = report["max_prompt_tokens"]
    yield f"p50 to max: tokens of a prompt, of which rollout.max_prompt_tokens allows {limit:,}"
    yield from (
        f"bad rows of {one['name']}: {by_kind(one['bad'])}" for one in sources if one["bad"]
    )
    for one in sources:
        if one["first"] is not None:
            yield from _lines_of(one["first"])
    yield ""
    yield report["summary"]


def _lines_of(first: First) -> Iterator[str]:
    yield f"\n{first['id']}, the first of its source ({first['where']}):"
    yield from (f"    | {line}" for line in first["text"].split("\n"))
    ids = first["token_ids"]
    yield f"    {len(ids)} token ids: {' '.join(map(str, ids))}"
    reference = " ".join(first["reference"].split()) or "none"
    read = (f"{name} reads {' or '.join(one)}" for name, one in first["reference_read"].items())
    yield "; ".join((f"    reference: {reference}", *read))


def _refused(error: str, code: int = WRONG_INPUT_EXIT_CODE) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
