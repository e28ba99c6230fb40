"""What the models of an evaluation are asked, read before an engine starts.

Tokenizers are real ones of transformers, trained on the spot. Not exercised: engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError
from sfpo_megatron.demo.tiny_model import train_tokenizer
from sfpo_megatron.evaluate import settings_of
from sfpo_megatron.evaluation.models import Model
from sfpo_megatron.evaluation.problems import Problems, problems_of
from sfpo_megatron.evaluation.records import EvaluationError, Records
from sfpo_megatron.evaluation.request import Request

LONG = "State the final answer to the following problem: 1 + 2 ="
TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + TURNS
THEN = "2026-01-31T23:59:00"


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., Request]:
    """A request of two models: `a` has the words of the prompts as tokens, `b` only bytes."""
    for name, texts in (("a", [LONG]), ("b", ["x"])):
        tokenizer = train_tokenizer(texts * 4, 383)
        tokenizer.chat_template = DATED
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": prompt, "answer": "3"} for prompt in ("1 + 2 =", LONG)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(source="jsonl", path=str(tmp_path / "rows.jsonl"))

    def made(*, fresh: bool = False, max_prompt_tokens: int = 128, **data: Any) -> Request:
        return Request(
            models=tuple(Model(name=name, hf=tmp_path / name) for name in ("a", "b")),
            config=run_config(
                data={"train": (source,), "eval": (source,), **data},
                rollout={"max_prompt_tokens": max_prompt_tokens},
            ),
            fresh=fresh,
            as_json=True,
            quiet=True,
        )

    return made


def keep(asked: Problems) -> None:
    """Begin its records."""
    settings = settings_of(asked.model, asked.config, asked.prompts, date=asked.date)
    with Records(asked.folder, settings, n=1):
        pass


def test_a_printed_date_is_that_of_the_records(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    """Those of the first model are there from another day; the second is asked the same."""
    out = tmp_path / "out"
    out.mkdir()
    today = problems_of(request_of(chat_template=True), out)
    assert today[0].date is not None and today[0].date == today[1].date
    folder = today[0].folder
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"date": THEN}))
    first, second = problems_of(request_of(chat_template=True), out)
    for asked in (first, second):
        assert asked.date == THEN and asked.prompts[0].text.startswith("31 Jan 2026[user]")
    (folder / "settings.json").unlink()
    keep(first)
    (again, _) = problems_of(request_of(chat_template=True), out)
    keep(again)  # the same settings: nothing is refused
    fresh = problems_of(request_of(chat_template=True, fresh=True), out)
    assert fresh[0].date not in (None, THEN)
    assert [asked.date for asked in problems_of(request_of(), out)] == [None, None]


def test_models_that_would_get_different_problems(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    """Before the first is evaluated: they could not be compared at the end."""
    assert [len(asked.prompts) for asked in problems_of(request_of(), tmp_path)] == [2, 2]
    few = request_of(max_prompt_tokens=24, on_bad_row="skip")
    with pytest.raises(
        EvaluationError, match=r"--model b: found 1 problems .*rows/2 by a alone"
    ) as e:
        problems_of(few, tmp_path)
    assert "1 bad rows skipped" in str(e.value)
    with pytest.raises(DataError, match=r"rows.jsonl:2: found a prompt of 5\d tokens"):
        problems_of(request_of(max_prompt_tokens=24), tmp_path)
    none = problems_of(request_of(max_prompt_tokens=8, on_bad_row="skip"), tmp_path)
    assert [asked.said.partition(" (")[0] for asked in none] == ["1 bad rows skipped"] * 2
