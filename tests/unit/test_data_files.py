"""Files as users have them: other encodings and packings, hidden files, links, columns that are not
what they seem. Not exercised: the tokenizer (test_data_templates.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.sources import source_rows

LINE = '{"prompt": "6 * 7 =", "answer": "42"}\n'


def read(path: Path, **more: Any) -> list[Row | DataError]:
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = DataSource(source=kind, path=str(path), **more)
    return list(source_rows(source, seed=0, key="data.train.0", name="rows"))


def row(value: dict[str, Any], **more: Any) -> Row | DataError:
    return row_of(value, where="f:1", row_id="1", **more)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ((LINE * 3).encode("utf-16"), "text in UTF-16"),
        (b"\x28\xb5\x2f\xfdxxx", "packed with zstd"),
        (b"BZh91AY", "packed with bzip2"),
        (b"\xfd7zXZ\0", "packed with xz"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1", "a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer"),
        (json.dumps([json.loads(LINE)] * 2, indent=1).encode(), "a JSON array"),
        (b"\xef\xbb\xbf" + json.dumps([json.loads(LINE)] * 9).encode(), "a JSON array"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        ((LINE.strip() + "\r").encode() * 9, "lines that end in a carriage return alone"),
        (b'\xef\xbb\xbf{\r\n  "data": []\r\n}\r\n', "JSON over several lines"),
    ],
)
def test_what_has_no_lines_is_said_of_the_file(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=what) as raised:
        read(tmp_path / "rows.jsonl")
    assert str(raised.value).startswith("data.train.0.path: found ")


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path) -> None:
    """In a jsonl file as in parquet, where Arrow does not look at them; the others are read."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "0"}\n' + LINE.encode())
    bytes_ = [b"1 + %d =" % n if n != 5 else b"\xff" for n in range(9)]
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 9, pyarrow.array(bytes_, pyarrow.binary()).buffers()
    )
    table = pyarrow.table({"prompt": texts, "answer": [str(n) for n in range(9)]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    for name, place, size in (("rows.jsonl", 0, 2), ("rows.parquet", 5, 9)):
        found = read(tmp_path / name)
        assert [n for n, row in enumerate(found) if isinstance(row, DataError)] == [place]
        assert str(found[place]).startswith(f"{tmp_path / name}:{place + 1}: found ")
        assert "'utf-8' codec can't decode byte 0xff" in str(found[place]) and len(found) == size


def test_a_name_that_is_there_twice_is_not_settled_silently(tmp_path: Path) -> None:
    """Both JSON and Arrow would take the last."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.jsonl").write_text(
        LINE + '{"prompt": "1 + 1 =", "answer": "2", "answer": "3"}'
    )
    good, bad = read(tmp_path / "rows.jsonl")
    assert isinstance(good, Row) and isinstance(bad, DataError)
    assert "two keys named 'answer'" in str(bad) and "rows.jsonl:2" in str(bad)
    columns = [pyarrow.array([text]) for text in ("1 + 1 =", "2", "3")]
    table = pyarrow.table(columns, names=["prompt", "answer", "answer"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="found two columns named 'answer', expected one of each"):
        read(tmp_path / "rows.parquet")
    inner = pyarrow.StructArray.from_arrays(columns[1:], names=["ground_truth"] * 2)
    table = pyarrow.table([columns[0], inner], names=["prompt", "reward_model"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    said = "found two fields in column 'reward_model' named 'ground_truth', expected one of each"
    with pytest.raises(DataError, match=said):
        read(tmp_path / "rows.parquet")


def test_utf_16_without_its_mark_is_bad_in_every_line(tmp_path: Path) -> None:
    """The second line begins with the half of a character, and is JSON in the other byte order."""
    text = LINE.replace("6 * 7", "你好")
    (tmp_path / "rows.jsonl").write_bytes((text * 3).encode("utf-16-le"))
    found = read(tmp_path / "rows.jsonl")
    assert found and all(isinstance(one, DataError) for one in found)
    assert "UTF-8" in str(found[1])


def test_a_byte_order_mark_of_utf_8_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf\n" + b"\xef\xbb\xbf" + LINE.encode())
    (one,) = read(tmp_path / "rows.jsonl")
    assert isinstance(one, Row) and one.id == "rows/2"


def test_hidden_files_of_a_directory_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7")  # what a Mac leaves beside a file
    assert len(read(tmp_path)) == 1
    assert len(read(tmp_path / "._a.jsonl")) == 1, "named in full it is read"


@pytest.mark.parametrize("path", ["", "*.jsonl", "b.jsonl"])
def test_a_link_that_leads_nowhere_is_no_missing_shard(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b\.jsonl"):
        read(tmp_path / path)


def test_columns_that_collide() -> None:
    for columns in ({"prompt": "q", "answer": "q"}, {"answer": "prompt"}, {"system": "prompt"}):
        with pytest.raises(FieldError, match="a column each"):
            DataSource(source="jsonl", path="f", columns=columns)
    DataSource(source="jsonl", path="f", columns={"prompt": "q", "metadata": "q"})


def test_an_instruction_is_not_dropped_for_its_input() -> None:
    """Alpaca's columns are NeMo-RL's `input` and `output` and one more."""
    nemo = row({"input": "6 * 7 =", "output": "42"})
    assert isinstance(nemo, Row) and nemo.layout == "NeMo-RL"
    alpaca = row({"instruction": "Multiply.", "input": "6 * 7 =", "output": "42"})
    assert isinstance(alpaca, DataError) and "'instruction'" in str(alpaca)
    named = {"prompt": "instruction", "answer": "output"}
    mapped = row({"instruction": "6 * 7 =", "input": "", "output": "42"}, columns=named)
    assert isinstance(mapped, Row) and mapped.question == "6 * 7 ="


def test_a_mapped_system_message_is_text() -> None:
    columns = {"system": "sys"}
    value = {"prompt": "q", "answer": "1"}
    for absent in ({}, {"sys": None}, {"sys": ""}):
        found = row(value | absent, columns=columns)
        assert isinstance(found, Row) and found.system == ""
    found = row(value | {"sys": ["be brief"]}, columns=columns)
    assert isinstance(found, DataError) and "sys = ['be brief']" in str(found)


def test_a_column_that_was_left_out_is_not_just_missing(tmp_path: Path) -> None:
    """A date beside the ground truth: the object is no JSON as a whole."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    day = pyarrow.array([{"ground_truth": "42", "at": 0}]).cast(
        pyarrow.struct([("ground_truth", pyarrow.string()), ("at", pyarrow.timestamp("ns"))])
    )
    table = pyarrow.table({"prompt": ["6 * 7 ="], "reward_model": day})
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = DataSource(source="parquet", path=str(tmp_path / "rows.parquet"))
    (found,) = source_rows(source, seed=0, key="k", name="rows")
    assert isinstance(found, DataError) and "JSON cannot hold reward_model" in str(found)


def test_a_response_in_another_encoding_is_a_bad_line() -> None:
    from sfpo_megatron.config.source_files import text_of

    line = b"\0" + json.dumps({"response": "x"}).encode("utf-16-le") + b"\n"
    with pytest.raises(ValueError, match="expected UTF-8"):
        text_of(line)
    assert json.loads(text_of("\ufeff{}".encode())) == {}


def test_a_column_of_json_has_its_values(tmp_path: Path) -> None:
    """The library datasets keeps a column of several types so. Its text would be another prompt,
    with quotation marks, and another answer. Not exercised: Arrow before 19, which has no such
    type."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "1 + 1 ="}]
    prompts = ["6 * 7 =", turns, [{"role": "user", "content": [{"type": "text", "text": "2 ="}]}]]
    answers = [r"\frac{1}{2}", 2, 0.1000000000000000055]
    texts = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.json_())])
    table = pyarrow.table(
        {
            "prompt": pyarrow.array(list(map(json.dumps, prompts)), pyarrow.json_()),
            "answer": pyarrow.array(list(map(json.dumps, answers)), pyarrow.json_()),
            "of_turns": pyarrow.array([[{"role": "user", "content": '"hi"'}]] * 3).cast(
                pyarrow.list_(texts)
            ),
            "more": pyarrow.array(['{"a": [1, "x"]}', None, "null"], pyarrow.json_()),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    found = [one for one in read(tmp_path / "rows.parquet") if isinstance(one, Row)]
    assert [one.question for one in found] == ["6 * 7 =", "1 + 1 =", "2 ="]
    assert [one.answer for one in found] == [r"\frac{1}{2}", "2", "0.1"]
    assert [one.metadata["more"] for one in found] == [{"a": [1, "x"]}, None, None]
    assert found[0].metadata["of_turns"] == [{"role": "user", "content": "hi"}]
    columns = {"prompt": "of_turns", "answer": "answer"}
    first = read(tmp_path / "rows.parquet", columns=columns)[0]
    assert isinstance(first, Row) and first.question == "hi"


def test_a_column_of_json_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    prompts = pyarrow.array(['"6 * 7 ="', "6 * 7 ="], pyarrow.json_())
    parquet.write_table(
        pyarrow.table({"prompt": prompts, "answer": ["42", "42"]}), tmp_path / "rows.parquet"
    )
    good, bad = read(tmp_path / "rows.parquet")
    assert isinstance(good, Row) and isinstance(bad, DataError) and bad.kind == "not JSON"
    assert "rows.parquet:2: found prompt = '6 * 7 =' in a column of JSON" in str(bad)


def test_a_file_without_a_column_that_can_be_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [b"x"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"data.train.0.path: found no column.*, of image, expec"):
        read(tmp_path / "rows.parquet")
