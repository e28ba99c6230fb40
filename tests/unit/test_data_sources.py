"""Files of a source: gzip, directories, globs, data sets of Hugging Face; weights; repeats."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made.prompts import make_config, sums

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.rules.rows import at_most
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream, eval_prompts
from sfpo_megatron.data.order import epoch_order
from sfpo_megatron.data.rows import same_question
from sfpo_megatron.data.sources import source_rows


def lines(*numbers: int, answer: str = "") -> str:
    rows = ({"prompt": f"What is {n}?", "answer": answer or str(n)} for n in numbers)
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(path: Path, *numbers: int, **more: Any) -> DataSource:
    path.write_text(lines(*numbers))
    return DataSource(source="jsonl", path=str(path), **more)


def ids(source: DataSource, name: str = "n") -> list[str]:
    found = source_rows(source, seed=0, key="data.train[0]", name=name)
    return [row.id for row in found if not isinstance(row, DataError)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text(lines(3))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(1, 2).encode()))
    (folder / "notes.txt").write_text("no rows")
    (folder / "deep" / "b.jsonl").write_text(lines(4))
    return folder


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["n/a.jsonl.gz/1", "n/a.jsonl.gz/2", "n/b.jsonl/1"]),
        ("/*.jsonl", ["n/b.jsonl/1"]),
        ("/**/b.jsonl", ["n/parts/b.jsonl/1", "n/deep/b.jsonl/1"]),
        ("/a.jsonl.gz", ["n/1", "n/2"]),
        ("/[ab].jsonl*", ["n/a.jsonl.gz/1", "n/a.jsonl.gz/2", "n/b.jsonl/1"]),
    ],
)
def test_several_files(folder: Path, path: str, expected: list[str]) -> None:
    source = DataSource(source="jsonl", path=f"{folder}{path}")
    assert ids(source) == expected
    assert at_most(source, 100) == len(expected)  # what `check` counts


def test_a_message_names_the_file_and_the_line(folder: Path, tokenizer: Any) -> None:
    (folder / "b.jsonl").write_text(lines(3) + "rubbish\n")
    source = DataSource(source="jsonl", path=str(folder))
    with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}/b.jsonl:2: "):
        PromptStream(make_config([source]), tokenizer)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(1, 2).encode())[:-9])
    with pytest.raises(DataError, match=r"data.train\[0\].path: .*a.jsonl.gz.* to its end"):
        ids(source)


@pytest.mark.parametrize("path", ["none", "parts/deep/*.parquet", "parts/*.txt/x"])
def test_no_file(folder: Path, path: str) -> None:
    source = DataSource(source="jsonl", path=str(folder.parent / path))
    with pytest.raises(DataError, match=r"data.train\[0\].path: .* a glob that matches some"):
        ids(source)


def test_parquet_of_several_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, size in (("a", 2), ("b", 1)):
        table = pyarrow.table(
            {"prompt": [f"{name}{n}" for n in range(size)], "answer": ["1"] * size}
        )
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    source = DataSource(source="parquet", path=str(tmp_path))
    assert ids(source) == ["n/a.parquet/1", "n/a.parquet/2", "n/b.parquet/1"]
    assert at_most(source, 100) == 3


def test_without_the_library_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"data.train\[0\].source: found hf.*sfpo-megatron\[datas"):
        ids(DataSource(source="hf", path=str(tmp_path)))


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    """A real directory of save_to_disk's, of one split and of two."""
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": f"p{n}", "answer": n} for n in range(3)])
    one.save_to_disk(tmp_path / "one")
    two = datasets.DatasetDict({"train": one, "test": one.select([2])})
    two.save_to_disk(tmp_path / "two")
    assert ids(DataSource(source="hf", path=str(tmp_path / "one"))) == ["n/1", "n/2", "n/3"]
    assert ids(DataSource(source="hf", path=str(tmp_path / "two"), split="test")) == ["n/1"]
    with pytest.raises(DataError, match=r"data.train\[0\].split: found None, expected one of tr"):
        ids(DataSource(source="hf", path=str(tmp_path / "two")))
    for name in ("one", "two"):  # a slice would be passed over: all rows, those held out too
        with pytest.raises(DataError, match=r"split: found 'train\[:1\]'.*read whole; set size"):
            ids(DataSource(source="hf", path=str(tmp_path / name), split="train[:1]"))


@pytest.mark.parametrize(
    ("config", "split", "said"),
    [
        (None, "train", r"config: found None, expected one of main, socratic; set config"),
        ("mian", "train", r"config: found 'mian', expected one of main, socratic; set config"),
        ("mian", None, r"config: found 'mian', expected one of main, socratic; set config"),
        ("main", "tes", r"split: found 'tes', expected one of train, test; set split"),
        ("main", "train[:x]", r"path: found '.*': ValueError: .*train\[:x\]"),
    ],
)
def test_the_field_at_fault_is_named(
    tmp_path: Path, config: str | None, split: str | None, said: str
) -> None:
    """A directory of files with a card, as one on the hub has it; its errors are bare ValueErrors,
    and the word config stands in its name."""
    pytest.importorskip("datasets")
    folder = tmp_path / "config"
    folder.mkdir()
    files = "  - {{split: {1}, path: {0}-{1}.jsonl}}\n"
    parts = ""
    for name in ("main", "socratic"):
        parts += f"- config_name: {name}\n  data_files:\n"
        for number, part in enumerate(("train", "test")):
            parts += files.format(name, part)
            (folder / f"{name}-{part}.jsonl").write_text(lines(number))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    source = DataSource(source="hf", path=str(folder), config="main", split="test")
    assert ids(source) == ["n/1"]
    with pytest.raises(DataError, match=rf"data.train\[0\].{said}"):
        ids(DataSource(source="hf", path=str(folder), config=config, split=split))


def test_classes_are_their_names(tmp_path: Path) -> None:
    """MMLU's answer is one of four classes; -1 is none of them."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        prompt=datasets.Value("string"), answer=datasets.ClassLabel(names=["A", "B"])
    )
    rows = {"prompt": ["p", "q", "r"], "answer": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    source = DataSource(source="hf", path=str(tmp_path / "d"))
    found = list(source_rows(source, seed=0, key="k", name="n"))
    assert [row.answer for row in found if not isinstance(row, DataError)] == ["B", "A"]
    assert isinstance(found[2], DataError) and found[2].kind == "without answer"


def test_repeats_are_kept_once_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(1, 2, 3) * 100)
    source = DataSource(source="jsonl", path=str(file))
    stream = PromptStream(make_config([source]), tokenizer)
    assert [prompt.id for prompt in stream.prompts] == ["rows/1", "rows/2", "rows/3"]
    assert "297 rows repeated an earlier one" in stream.summary
    with pytest.raises(DataError, match="found 3 prompts, expected at least one batch of 4"):
        stream.hold_batch(4)
    held_out = eval_prompts(make_config([source], [source]), tokenizer)
    assert len(held_out) == 300  # an evaluation asks what its file says


def test_what_is_a_repeat(tmp_path: Path, tokenizer: Any) -> None:
    """The same question, system message and answer; of another file too. A generator's problems
    stay, and so does a source that is listed twice."""
    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 1?"}]
    more = [
        {"prompt": "What  is 1?", "answer": "1"},
        {"prompt": asked, "answer": "1"},
        {"prompt": "What is 1?", "answer": "one"},
        {"prompt": "What is 1?", "answer": "one"},
    ]
    first = jsonl(tmp_path / "a.jsonl", 1, 2)
    second = tmp_path / "b.jsonl"
    second.write_text("".join(json.dumps(row) + "\n" for row in more))
    sources = [first, DataSource(source="jsonl", path=str(second))]
    stream = PromptStream(make_config(sources), tokenizer)
    assert [prompt.id for prompt in stream.prompts] == ["a/1", "a/2", "b/2", "b/3"]
    assert "2 rows repeated an earlier one" in stream.summary
    assert (
        f"1 row answers an earlier question differently (the first: 'What is 1?' is '1' in "
        f"{first.path}:1 and 'one' in {second}:3)" in stream.summary
    )
    again = "".join(json.dumps(row) + "\n" for row in [*more[2:], *more[:3]])
    second.write_text(again)  # letter by letter a row that came otherwise before
    assert "3 rows repeated" in PromptStream(make_config(sources), tokenizer).summary
    one_digit = sums(300, min_digits=1, max_digits=1)
    assert len(PromptStream(make_config([one_digit]), tokenizer).prompts) == 300
    assert len(PromptStream(make_config([first, first]), tokenizer).prompts) == 4


@given(st.text(st.sampled_from("ab \t\n\x1c\x85\xa0\u2003\u3000\u200b\xe9\U0001f600")))
def test_white_space_makes_no_other_question(question: str) -> None:
    assert same_question(question) == " ".join(question.split())


# ---- weights -----------------------------------------------------------------------------------


def test_weights_are_exact_shares() -> None:
    """In each epoch; over as many epochs as the light source needs, each of its prompts once."""
    epochs = [epoch_order(3, epoch, [10, 12], [2.0, 0.5]) for epoch in range(4)]
    for order in epochs:
        assert len(order) == len(set(order)) == 13
        assert {index for index in order if index < 10} == set(range(10))
    drawn = Counter(index for order in epochs for index in order if index >= 10)
    assert drawn == Counter(range(10, 22))
    assert epochs[0] != sorted(epochs[0])


def test_equal_weights_change_nothing() -> None:
    assert epoch_order(1, 2, [5, 7], [3.0, 3.0]) == epoch_order(1, 2, [12], [1.0])


def test_a_weighted_run_resumes_exactly(tmp_path: Path, tokenizer: Any) -> None:
    """Also where the weights are changed: the epoch under way ends as it began."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    sources = [jsonl(a, *range(20)), jsonl(b, *range(20, 40), weight=0.25)]
    config = make_config(sources)
    stream = PromptStream(config, tokenizer)
    stream.next_batch(10)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_batch(10) for _ in range(5)]
    again = PromptStream(config, tokenizer)
    again.load_state_dict(state)
    assert [again.next_batch(10) for _ in range(5)] == expected
    equal = PromptStream(make_config([jsonl(a, *range(20)), jsonl(b, *range(20, 40))]), tokenizer)
    equal.load_state_dict(state)
    assert equal.next_batch(10) == expected[0]
    state = json.loads(json.dumps(equal.state_dict()))
    epochs = Counter(p.id[0] for _ in range(4) for p in equal.next_batch(10))
    assert epochs == {"a": 20, "b": 20}
    with pytest.raises(DataError, match=r"found 40 prompts \(25 an epoch"):
        again.hold_batch(26)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", 0.0),
        ("split", "train"),
        ("config", "main"),
        ("columns", {"question": "prompt"}),
    ],
)
def test_a_field_that_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=rf"^{field}: "):
        DataSource(source="jsonl", path="x.jsonl", **{field: value})
