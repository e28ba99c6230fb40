"""What a run trains and is evaluated on, held to what the run that it continues had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfpo_megatron.checkpoints.identity import RunRecord
from sfpo_megatron.checkpoints.store import Found
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream, date_of, print_of, renaming
from sfpo_megatron.data.reading import EVAL, source_names, source_names_of
from sfpo_megatron.data.run_data import RunData
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.saving import read_run_state


def read_data(config: RunConfig, continued: Found | None) -> RunData:
    """What a run with engines reads, on rank 0 alone; DataError if it cannot be used."""
    tokenizer = load_tokenizer(config.model.path)
    data = RunData.read(config, tokenizer, now=date_then(continued))
    data.bad.settle()
    return data


def date_then(found: Found | None) -> str | None:
    """The time that the prompts of the checkpoint print, from which the run continues; None if they
    print none, or it begins."""
    state = {} if found is None else read_run_state(found.directory)
    return date_of(state.get("data", {}).get("prompts") or {})


def held_to(
    data: RunData, config: RunConfig, found: Found, accept: bool
) -> tuple[RunData, list[str]]:
    """The data as the checkpoint that the run continues from knows it, and what is to be said."""
    state, directory = read_run_state(found.directory), RunDirectory.of(config.output_dir)
    said = hold_to_data(data.prompts, found, state, directory, accept=accept)
    names = source_names(config.data.eval, EVAL)
    held_out = data.held_out.renamed(renaming(names, data.prompts.eval_names))
    return replace(data, held_out=held_out), [said] if said else []


def hold_to_data(
    prompts: PromptStream,
    found: Found,
    state: Mapping[str, Any],
    directory: RunDirectory,
    *,
    accept: bool,
) -> str:
    """Compare the prompts with those of the checkpoint that the run continues from, before any
    engine starts; what is to be said of an accepted change, empty without one. `state`: its
    run_state.json. DataError if they differ and that is not accepted."""
    cursor = state["data"].get("prompts")
    if cursor is None:  # debug.train_only alone has trained: no prompt has been drawn
        return ""
    # Those of the format before have no names; ids, and the fingerprint, were made of these.
    cursor |= source_names_of(state["config"]) | cursor
    what = prompts.difference(cursor)
    if not what:
        return ""
    record, then, now = RunRecord.read(directory), print_of(cursor), prompts.fingerprint
    assert record is not None, "a run that continues has a record"
    known = record.accepted(then=then, now=now)
    if not (accept or known):
        raise DataError(
            f"data.train, against {found.directory.name}",
            found=what,
            expected="the rows that the run has trained on (data.eval, tokenizer and "
            "rollout.max_prompt_tokens count, names of files do not)",
            fix="undo the change, or go on with it by --accept-data-change",
        )
    if not known:
        record.with_data_change(after_step=found.step, then=then, now=now, what=what).write(
            directory
        )
    prompts.accept(cursor)
    return f"the data has changed since step {found.step}, accepted: {what}"
