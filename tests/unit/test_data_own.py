"""A data source of one's own: called as the built-in ones are, its rows held to the same rules.

Not exercised: a whole run (tests/e2e trains on the built-in sources).
"""

from __future__ import annotations

from typing import Any

import pytest
from made.prompts import make_config

from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.data import PromptStream, eval_prompts, sources
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.rows import BadRows, Row
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.plugins import SOURCE, PluginError


def read(name: str, size: int | None = None, seed: int = 0) -> list[Row | DataError]:
    source = DataSource(source=name, size=size, args={"first": 5})
    return list(source_rows(source, seed=seed, key="data.train[0]", name="own"))


def test_its_rows_are_rows_and_its_bad_rows_are_named() -> None:
    """`size` counts good rows, and an endless source is read no further."""
    first, second, bad, third = read("own_sources:sums", size=3)
    assert isinstance(first, Row) and isinstance(second, Row) and isinstance(third, Row)
    assert [row.id for row in (first, second, third)] == ["own/1", "own/2", "own/4"]
    assert (first.question, first.answer, first.metadata) == ("5 + 1 =", "6", {"level": 2})
    assert (second.question, second.answer) == ("5 + 2 =", "7")
    assert third.question == "6 + 1 ="
    assert str(bad).startswith(
        "data.train[0] (own_sources:sums row 3): found no key 'answer' (keys: ['prompt'])"
    )
    counted = BadRows("skip")
    assert len(list(counted.good([first, second, bad], "own"))) == 2 and counted.num_skipped == 1


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("sums", None, r"data\.train\[0\]\.size: found null, and 34 rows from own_sources:sums so"),
        ("nonsense", None, r"data\.train\[0\]\.size: found null, and 0 rows from"),
        ("nonsense", 3, r"data\.train\[0\]\.source: found own_sources:nonsense, which gave 0 g"),
    ],
)
def test_a_source_without_an_end_is_refused(
    name: str, size: int | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a bounded count of rows, here 50: it would be read for ever. With a size that good rows
    reach it is read no further than that."""
    monkeypatch.setattr(sources, "MOST_ROWS", 50)
    with pytest.raises(DataError, match=says):
        read(f"own_sources:{name}", size=size)
    assert len(read("own_sources:sums", size=60)) == 89
    assert len(read("own_sources:odd")) == 5


def test_it_is_given_the_seed() -> None:
    (row,) = read("own_sources:sums", size=1, seed=7)
    assert isinstance(row, Row) and row.question == "12 + 1 ="


def test_any_mapping_is_a_row_and_what_cannot_be_scored_is_left_out() -> None:
    """Scoring processes get a row as JSON: what is no JSON would end a run at its first step."""
    first, bad, *rest = read("own_sources:odd")
    assert isinstance(first, Row) and first.answer == "2"
    assert first.metadata == {"levels": (1, [2, None])}
    says = "found ('2 + 2 =', '4'), expected an object such as"
    assert str(bad).startswith(f"data.train[0] (own_sources:odd row 2): {says}")
    assert [(row.answer, dict(row.metadata), row.left_out) for row in rest
            if isinstance(row, Row)] == [
        ("6", {}, ("made",)), ("8", {}, ("image",)), ("10", {}, ())]  # fmt: skip


def test_a_run_draws_from_it_and_its_held_out_questions_are_left_out(tokenizer: Any) -> None:
    """Ids, cursor and fingerprint as for any source; `data.eval`'s rows are the same in every run,
    also where they are read twice."""
    own = DataSource(source="own_sources:sums", size=20)
    held_out = DataSource(source="own_sources:sums", size=4)

    def config(**changes: Any) -> RunConfig:
        return make_config([own], [held_out], on_bad_row="skip", **changes)

    stream = PromptStream(config(seed=3), tokenizer)
    assert {prompt.id.split("/")[0] for prompt in stream.prompts} == {"own_sources:sums"}
    questions = {prompt.question for prompt in stream.prompts}
    evals = [eval_prompts(config(seed=seed), tokenizer) for seed in (3, 4)]
    assert evals[0] == evals[1] and len(evals[0]) == 4
    assert questions.isdisjoint(prompt.question for prompt in evals[0])
    first = stream.next_batch(5)
    again = PromptStream(config(seed=3), tokenizer)
    cursor = stream.state_dict()
    rest = stream.next_batch(5)
    again.load_state_dict(cursor)
    assert again.next_batch(5) == rest and again.prompts == stream.prompts
    assert first != rest
    with pytest.raises(DataError, match="resume with the data, tokenizer and seed"):
        PromptStream(config(seed=4), tokenizer).load_state_dict(cursor)
    with pytest.raises(DataError, match=r"^data\.train\[0\] \(own_sources:sums row 3\): found no"):
        PromptStream(make_config([own]), tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_sources:broken",
            r"data\.train\[0\]\.source: found own_sources:broken, which raised KeyError: .*no such "
            r"column.* after 1 rows",
        ),
        ("own_sources:leaves", r"which raised SystemExit: '0' after 1 rows"),
        ("own_sources:no_rows", r"which raised TypeError: .*not iterable.* after 0 rows"),
    ],
)
def test_what_it_raises_names_it(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(name)


def test_what_cannot_be_called_is_refused_without_an_import_too() -> None:
    for look in (SOURCE.load, SOURCE.find):
        with pytest.raises(PluginError, match=r"cannot be called with \(source, seed\)"):
            look("own_sources:wrong_form")


def test_the_example_is_a_source() -> None:
    source = DataSource(source="examples.your_own.source:rows", size=50, args={"below": 10})
    rows = list(source_rows(source, seed=1, key="data.train[0]", name="sums"))
    assert len(rows) == 50 and all(isinstance(row, Row) for row in rows)
    for row in rows:
        assert isinstance(row, Row)
        a, b = row.question.removesuffix(" =").split(" + ")
        assert int(a) < 10 and row.answer == str(int(a) + int(b))
    again = list(source_rows(source, seed=1, key="data.train[0]", name="sums"))
    assert again == rows
