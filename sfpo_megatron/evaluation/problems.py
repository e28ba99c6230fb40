"""The problems of every model that is evaluated, read before an engine starts.

Models that are compared are asked the same problems, each through its own tokenizer and template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import eval_prompts
from sfpo_megatron.data.rendering import Renderer
from sfpo_megatron.data.rows import BadRows
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.evaluation.models import Model
from sfpo_megatron.evaluation.records import DATE, EvaluationError, settings_in
from sfpo_megatron.evaluation.request import Request
from sfpo_megatron.types import Prompt


@dataclass(kw_only=True, frozen=True, slots=True)
class Problems:
    """What one model is asked."""

    model: Model
    config: RunConfig
    """The request's, with this model's path."""
    folder: Path
    """Directory of its records."""
    prompts: Sequence[Prompt]
    date: str | None
    """The time that its chat template prints, as ISO has it; None if it prints none."""
    said: str
    """What was left out, if anything was."""


def problems_of(request: Request, directory: Path) -> list[Problems]:
    """The problems of each model, whose records are below `directory`. A template that prints the
    date prints that of the records which are there, so that another day's start goes on with them.
    DataError for rows or a template that cannot be used; EvaluationError where models would get
    different problems."""
    folders = [directory / model.slug for model in request.models]
    settings = [None if request.fresh else settings_in(folder) for folder in folders]
    dates = [None if one is None else one.get(DATE) for one in settings]
    date = next(filter(None, dates), None)
    found: list[Problems] = []
    for model, folder, then in zip(request.models, folders, dates, strict=True):
        one = _problems(request, model, folder, then or date)
        date = date or one.date
        found.append(one)
    for one in found[1:]:
        _require_same(found[0], one)
    return found


def _problems(request: Request, model: Model, folder: Path, date: str | None) -> Problems:
    config = replace(request.config, model=replace(request.config.model, path=str(model.hf)))
    tokenizer = load_tokenizer(config.model.path)
    renderer = Renderer(config, tokenizer, date)
    bad = BadRows(config.data.on_bad_row)
    prompts = list(eval_prompts(config, tokenizer, bad=bad, renderer=renderer))
    bad.settle()
    return Problems(
        model=model,
        config=config,
        folder=folder,
        prompts=prompts,
        date=renderer.now,
        said=str(bad) if bad.num_skipped else "",
    )


def _require_same(first: Problems, other: Problems) -> None:
    ids = [{prompt.id for prompt in one.prompts} for one in (first, other)]
    if not (differing := sorted(ids[0] ^ ids[1])):
        return
    has, lacks = (first, other) if differing[0] in ids[0] else (other, first)
    raise EvaluationError(
        f"--model {other.model.name}: found {len(differing)} problems that only one of it and "
        f"{first.model.name} can be asked ({differing[0]} by {has.model.name} alone; of "
        f"{lacks.model.name}'s rows: {lacks.said}), expected the same problems, to compare the "
        "models on; raise rollout.max_prompt_tokens, correct the rows, or evaluate the models one "
        "by one"
    )
