"""Single rows: numbers, nulls, layouts, columns that JSON cannot hold. By exact values."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.prompts import make_config

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream
from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.data.values import number_text


def read(path: Path, source: str = "jsonl", **more: Any) -> list[Row | DataError]:
    entry = DataSource(source=source, path=str(path), **more)
    return list(source_rows(entry, seed=0, key="k", name="rows"))


def row(**value: Any) -> Row | DataError:
    return row_of(value, where="f:1", row_id="1")


NUMBERS = {
    "1e-7": "0.0000001",
    "1E3": "1000",
    "2.50": "2.5",
    "-0.0": "0",
    "1e22": "10000000000000000000000",
    "1e23": "100000000000000000000000",
    "0.1234567890123456789": "0.1234567890123456789",
    "3.0000000000000000001": "3.0000000000000000001",
    "1e-330": "0." + "0" * 329 + "1",
    "9007199254740993": "9007199254740993",
    "1e320": None,
    "1" + "0" * 320: None,
    "-1e320": None,
    "NaN": None,
    "Infinity": None,
    "-Infinity": None,
    "1e-500": None,
    "1e99999999999999999999": None,
    "-1.5E-99999999999999999999": None,
}


@pytest.mark.parametrize("written", NUMBERS)
def test_a_number_is_the_text_of_what_is_written(tmp_path: Path, written: str) -> None:
    """Against decimal arithmetic on the text of the file: no digit is lost or made up."""
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "p", "answer": {written}}}\n')
    (found,) = read(file)
    if NUMBERS[written] is None:
        assert isinstance(found, DataError) and str(found).startswith(f"{file}:1: ")
    else:
        assert isinstance(found, Row) and found.answer == NUMBERS[written]
        assert Decimal(found.answer) == Decimal(written)


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.float32(0.1), "0.1"), (np.float64(0.1), "0.1"), (np.float16(0.1), "0.1"),
     (np.int64(7), "7"), (np.uint8(7), "7"), (np.array(2.0), "2"), (Decimal("1.10"), "1.1"),
     (Decimal("1E+2"), "100"), (np.float32("nan"), None), (Decimal("NaN"), None),
     (np.bool_(True), None), (True, None), (1j, None)],
)  # fmt: skip
def test_numbers_of_libraries(value: object, text: str | None) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "answer", "layout"),
    [
        ({"answer": None, "reward_model": {"ground_truth": "4"}}, "4", "verl"),
        ({"answer": " ", "reward_model": {"ground_truth": 4}}, "4", "verl"),
        ({"answer": float("nan"), "label": "4"}, "4", "slime"),
        ({"answer": "5", "reward_model": {"ground_truth": "4"}}, "5", ""),
        ({"answer": "5", "label": "4"}, "5", ""),
        ({"label": "4"}, "4", "slime"),
    ],
)
def test_an_answer_that_is_null_beside_another(
    value: dict[str, Any], answer: str, layout: str
) -> None:
    found = row(prompt="2 + 2 =", **value)
    assert isinstance(found, Row) and (found.answer, found.layout) == (answer, layout)


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        ({"input": "2 + 2 =", "label": "4"}, "OpenRLHF"),
        ({"input": "2 + 2 =", "output": "4"}, "NeMo-RL"),
        ({"problem": "2 + 2 =", "expected_answer": "4"}, "NeMo-RL"),
    ],
)
def test_layouts_of_other_trainers(value: dict[str, Any], layout: str) -> None:
    found = row(**value, level=2)
    assert isinstance(found, Row)
    assert (found.question, found.answer, found.layout) == ("2 + 2 =", "4", layout)
    assert found.metadata == {"level": 2}


def test_columns_of_ones_own(tmp_path: Path) -> None:
    """Mapped columns are used, what has our names then is further columns."""
    file = tmp_path / "rows.jsonl"
    line = {"question": "2 + 2 =", "solution": {"final": 4}, "answer": "long", "who": "Add.",
            "info": {"level": 3}}  # fmt: skip
    file.write_text(json.dumps(line) + "\n" + json.dumps({"prompt": "p", "answer": "4"}) + "\n")
    columns = {"prompt": "question", "answer": "solution.final"}
    found, bad = read(file, columns=columns)
    assert isinstance(found, Row) and isinstance(bad, DataError)
    assert (found.question, found.answer, found.system) == ("2 + 2 =", "4", "")
    assert found.metadata["answer"] == "long" and found.metadata["who"] == "Add."
    assert "no key 'question'" in str(bad)
    found, _ = read(file, columns={**columns, "system": "who", "metadata": "info"})
    assert isinstance(found, Row) and found.system == "Add." and found.metadata == {"level": 3}


def test_a_column_called_system_is_metadata() -> None:
    found = row(prompt="p", answer="4", system="planetary")
    assert isinstance(found, Row)
    assert found.system == "" and found.metadata == {"system": "planetary"}


@pytest.mark.parametrize("name", ["prompt", "answer", "content"])
@pytest.mark.parametrize("half", ["\ud83d", "\udc00"])
def test_half_of_a_surrogate_pair_is_a_bad_row(
    tmp_path: Path, tokenizer: Any, name: str, half: str
) -> None:
    value: dict[str, Any] = {"prompt": "2 + 2 =", "answer": "4"}
    if name == "content":
        value["prompt"] = [{"role": "user", "content": f"a {half} b"}]
    else:
        value[name] = f"a {half} b"
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps(value) + "\n" + json.dumps({"prompt": "p \U0001f600", "answer": "1"})
    )
    (bad, good) = read(file)
    assert isinstance(bad, DataError) and str(bad).startswith(f"{file}:1: found half of a surr")
    assert isinstance(good, Row)
    source = DataSource(source="jsonl", path=str(file))
    stream = PromptStream(make_config([source], on_bad_row="skip"), tokenizer)
    assert [prompt.id for prompt in stream.prompts] == ["rows/2"]


NOT_JSON = {
    "datetime": datetime.datetime(2026, 1, 1),
    "date": datetime.date(2026, 1, 1),
    "time": datetime.time(1),
    "bytes": b"png",
    "image": {"bytes": b"png", "path": None},
    "set": {1},
    "object": object(),
    "nested": [{"when": datetime.date(2026, 1, 1)}],
    "half": "\ud83d",
    "tuple key": {(1, 2): 3},
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_json_cannot_hold_is_left_out(name: str) -> None:
    found = row(prompt="p", answer="4", level=1, extra=NOT_JSON[name])
    assert isinstance(found, Row)
    assert found.metadata == {"level": 1} and found.left_out == ("extra",)


def test_numbers_of_libraries_in_metadata_are_plain_ones() -> None:
    found = row(prompt="p", answer="4", a=np.int64(3), b=Decimal("1.5"), c=np.array([1, 2]))
    assert isinstance(found, Row)
    assert json.loads(json.dumps(found.metadata)) == {"a": 3, "b": 1.5, "c": [1, 2]}


def test_parquet_columns_as_they_come(tmp_path: Path) -> None:
    """float32 in the fewest digits, also inside verl's object; times, bytes and nanoseconds, which
    have no Python value, are not read; a decimal is a number."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    table = pyarrow.table(
        {
            "prompt": ["p", "q"],
            "answer": pyarrow.array([0.1, None], pyarrow.float32()),
            "reward_model": pyarrow.array(
                [{"ground_truth": 0.3}, {"ground_truth": 0.7}],
                pyarrow.struct({"ground_truth": pyarrow.float32()}),
            ),
            "when": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
            "far": pyarrow.array([2**52, 1], pyarrow.timestamp("ms")),
            "took": pyarrow.array([1, 2], pyarrow.duration("ns")),
            "png": [b"1", b"2"],
            "share": pyarrow.array([0.1, 0.2], pyarrow.float32()),
            "price": pyarrow.array([Decimal("1.50"), None], pyarrow.decimal128(8, 2)),
        }
    )
    parquet.write_table(table, file)
    first, second = read(file, "parquet")
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.answer, second.answer) == ("0.1", "0.7")
    assert first.metadata == {"share": 0.1, "price": 1.5}
    assert first.left_out == ("when", "far", "took", "png")
