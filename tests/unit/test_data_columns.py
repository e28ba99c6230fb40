"""verl's columns in jsonl and parquet; what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.sources import source_rows

VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "What is 6 * 7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 3},
}


def read(source: str, path: Path | str, size: int | None = None) -> Iterator[Row | DataError]:
    entry = DataSource(source=source, path=str(path), size=size)
    return source_rows(entry, seed=0, key="k", name="rows")


def row(value: dict[str, Any]) -> Row | DataError:
    return row_of(value, where="f:1", row_id="f/1")


def test_verls_columns() -> None:
    found = row(VERL)
    assert isinstance(found, Row)
    assert (found.question, found.answer) == ("What is 6 * 7?", "42")
    assert found.metadata == {"data_source": "math", "ability": "math", "extra_info": {"index": 3}}


def test_a_system_message_is_kept_apart() -> None:
    system = {"role": "system", "content": "Be brief."}
    found = row({**VERL, "prompt": [system, *VERL["prompt"]]})
    assert isinstance(found, Row)
    assert found.question == "What is 6 * 7?" and found.metadata["system"] == "Be brief."


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"prompt": []}, "prompt = []"),
        ({"prompt": [{"role": "user"}]}, "prompt = "),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "prompt = "),
        ({"prompt": [{"role": "user", "content": "x"}] * 2}, "prompt = "),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt = "),
        ({"reward_model": {"style": "rule"}}, "no key 'answer'"),
        ({"reward_model": {"ground_truth": None}}, "no key"),
    ],
)
def test_refused(change: dict[str, Any], found: str) -> None:
    error = row({**VERL, **change})
    assert isinstance(error, DataError) and str(error).startswith("f:1: ")
    if found != "no key":
        assert found in str(error)


def test_jsonl_with_verls_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(VERL) + "\n" + json.dumps({"prompt": "1 + 1 =", "answer": 2}))
    first, second = read("jsonl", str(file))
    assert isinstance(first, Row) and first.answer == "42" and first.id == "rows/1"
    assert isinstance(second, Row) and second.answer == "2"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL] * 3000), file)
    rows = list(read("parquet", str(file), size=2500))
    assert len(rows) == 2500 and all(isinstance(found, Row) for found in rows)
    assert (rows[-1].id, rows[-1].where, rows[-1].answer) == ("rows/2500", f"{file}:2500", "42")
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="a readable parquet file"):
        list(read("parquet", str(file)))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="no pyarrow in this Python"):
        list(read("parquet", str(tmp_path / "rows.parquet")))
    with pytest.raises(DataError, match="a parquet file"):
        list(read("parquet", str(tmp_path / "none.parquet")))


@pytest.mark.parametrize("name", ["system", "metadata"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_mapped_column_that_no_row_has_is_an_error(
    name: str, size: int | None, tmp_path: Path
) -> None:
    """Misspelt, it would leave every prompt without its system message, or its metadata. One row
    that has it, though with null in it, is enough."""
    file = tmp_path / "rows.jsonl"
    plain = {"prompt": "1 + 1 =", "answer": "2", "who": {"role": "Be brief."}}
    talk = {"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]}
    file.write_text("".join(json.dumps(one) + "\n" for one in (plain, talk, plain)))

    def rows(column: str) -> list[Row | DataError]:
        source = DataSource(source="jsonl", path=str(file), size=size, columns={name: column})
        return list(source_rows(source, seed=0, key="data.train[1]", name="rows"))

    with pytest.raises(DataError, match=rf"data\.train\[1\]\.columns\.{name}: found 'wo\.role', "):
        rows("wo.role")
    assert len(rows("who.role")) == (size or 3)
    with file.open("a") as more:
        more.write(json.dumps({**plain, "wo": {"role": None}}) + "\n")
    if size is None:
        assert len(rows("wo.role")) == 4
