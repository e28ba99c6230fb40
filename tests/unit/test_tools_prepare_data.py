"""tools/prepare_data.py on small files in the layouts that the datasets have upstream.

Not exercised: the datasets themselves (there is no network in the tests).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.data.prepared import NotPrepared, Problem, write
from tools.prepare_data import main
from tools.prepared_sets import SETS

pyarrow = pytest.importorskip("pyarrow")

MATH500 = {"problem": "What is $1+1$?", "solution": "...", "answer": "2", "subject": "Algebra",
           "level": 1, "unique_id": "a"}  # fmt: skip
FRAMED = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def prepare(tmp_path: Path, *names: str) -> dict[str, Any]:
    arguments = ["--downloads", str(tmp_path / "downloads"), "--out", str(tmp_path / "out")]
    assert main([*names, *arguments]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out/manifest.json").read_text())["sets"]
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


# name -> (a file as `hf download` lays it, its rows, the (prompt, answer) pairs that they give)
LAYOUTS: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, str]]]] = {
    "math500": ("test.jsonl", [MATH500], [("What is $1+1$?", "2")]),
    "aime24": (
        "data/train-00000-of-00001.parquet",
        [{"id": 60, "problem": "Q", "solution": "s", "answer": "204", "url": "u", "year": "2024"}],
        [("Q", "204")],
    ),
    "aime25": (
        "data/train-00000-of-00001.parquet",
        [{"problem_idx": 1, "problem": "Q", "answer": 70, "problem_type": ["Number Theory"]}],
        [("Q", "70")],
    ),
    "amc": (
        "data/train-00000-of-00001.parquet",
        [{"id": 0, "problem": "Q", "answer": 142.0, "url": "u"}, {"id": 1, "problem": "R",
          "answer": 2.5, "url": "u"}, {"id": 2, "problem": "S", "answer": 1e-7, "url": "u"}],
        [("Q", "142"), ("R", "2.5"), ("S", "0.0000001")],
    ),
    "minerva": ("minervamath.jsonl", [{"question": "Q", "answer": "1.6e-19"}], [("Q", "1.6e-19")]),
    "olympiadbench": (
        "test.jsonl",
        [{"question": "Q", "final_answer": ["2", "-3"]}, {"question": "R", "final_answer": ["1"]}],
        [("Q", "2, -3"), ("R", "1")],
    ),
    "gsm8k": (
        "main/test-00000-of-00001.parquet",
        [{"question": "Q", "answer": "6*7 = <<6*7=42>>42 so it is\n#### 1,042"}],
        [("Q", "1042")],
    ),
    "lighteval-math": (
        "data/train-00000-of-00001.parquet",
        [{"problem": "Q", "level": "Level 5", "type": "Algebra",
          "solution": r"\boxed{1} is wrong, so it is $\boxed{\frac{1}{2}}$."}],
        [("Q", r"\frac{1}{2}")],
    ),
    "dapo-math-17k": (
        "data/train-00000-of-00001.parquet",
        [{"prompt": "Q", "target": "34", "data_source": "math_dapo"}],
        [("Q", "34")],
    ),
    "skywork-or1-math": (
        "data/math-00000-of-00001.parquet",
        [{"data_source": "train-math", "prompt": [{"role": "user", "content": "Q"}],
          "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"}}],
        [("Q", r"\frac{1}{2}")],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SETS)
def test_each_known_set_in_its_layout(name: str, tmp_path: Path) -> None:
    file, rows, expected = LAYOUTS[name]
    write = parquet if file.endswith("parquet") else jsonl
    path = write(tmp_path / "downloads" / name / file, rows)
    write(path.with_name("zother-0.parquet"), [{"nothing": 1}]) if file.startswith("data") else None
    entry = prepare(tmp_path, name)[name]
    out = tmp_path / f"out/{name}.parquet"
    assert [(row["prompt"], row["answer"]) for row in rows_of(out)] == expected
    assert entry["read"] == entry["rows"] == len(rows) and entry["bad"] == {}
    assert entry["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert entry["files"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert {p.name for p in out.parent.iterdir()} == {"manifest.json", out.name}


def test_dapos_own_release_in_verls_layout(tmp_path: Path) -> None:
    """Every row stands there about a hundred times, each framed by instructions."""

    def row(question: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": FRAMED.format(question)}],
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        }

    question = "Find $x$.\n\nIt is a number."
    file = tmp_path / "downloads/dapo-math-17k/data/dapo-math-17k.parquet"
    parquet(file, [row(question)] * 7 + [row("other")])
    entry = prepare(tmp_path, "dapo-math-17k")["dapo-math-17k"]
    assert (entry["read"], entry["repeated"], entry["rows"]) == (8, 6, 2)
    prompts = [row["prompt"] for row in rows_of(tmp_path / "out/dapo-math-17k.parquet")]
    assert prompts == [question, "other"]


def test_questions_of_benchmarks_are_taken_out_of_train_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a benchmark that was prepared before, white space aside."""
    jsonl(tmp_path / "downloads/math500/test.jsonl", [MATH500])
    prepare(tmp_path, "math500")
    rows = [{"prompt": "What  is\n$1+1$?", "target": "2"}, {"prompt": "New?", "target": "3"}]
    jsonl(tmp_path / "downloads/dapo-math-17k/train.jsonl.gz", rows)
    entry = prepare(tmp_path, "dapo-math-17k")["dapo-math-17k"]
    assert (entry["in_benchmarks"], entry["rows"]) == (1, 1)
    assert [row["prompt"] for row in rows_of(tmp_path / "out/dapo-math-17k.parquet")] == ["New?"]
    out, err = capsys.readouterr()
    assert "1 are questions of a benchmark" in out
    assert "found 1 rows, HuggingFaceH4/MATH-500 was published with 500" in err


def test_rows_without_an_answer_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"problem": "a", "solution": r"\boxed{1}"},
        {"problem": "b", "solution": r"\boxed{1"},
        {"problem": "c", "solution": "one"},
        {"problem": "", "solution": r"\boxed{1}"},
        {"problem": "a", "solution": r"\boxed{2}"},
    ]
    path = jsonl(tmp_path / "downloads/lighteval-math/train.jsonl", rows)
    entry = prepare(tmp_path, "lighteval-math")["lighteval-math"]
    assert (entry["read"], entry["rows"], entry["questions_with_several_answers"]) == (5, 2, 1)
    assert sum(entry["bad"].values()) == 3 and len(entry["bad"]) == 3
    assert f"left out: {path}:2: found a solution whose last" in capsys.readouterr().err


def test_numbers_are_those_that_are_written(tmp_path: Path) -> None:
    """In JSON more digits than a float has, in parquet fewer; what is no number is no answer."""
    numbers = ("1e-7", "0.1234567890123456789", "NaN", "1e999")
    rows = [f'{{"problem": "{n}", "answer": {text}}}\n' for n, text in enumerate(numbers)]
    path = tmp_path / "downloads/math500/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(rows))
    entry = prepare(tmp_path, "math500")["math500"]
    found = [row["answer"] for row in rows_of(tmp_path / "out/math500.parquet")]
    assert found == ["0.0000001", "0.1234567890123456789"] and sum(entry["bad"].values()) == 2
    import pyarrow.parquet

    path = tmp_path / "downloads/amc/train.parquet"
    path.parent.mkdir()
    column = pyarrow.array([0.1], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["Q"], "answer": column}), path)
    prepare(tmp_path, "amc")
    assert rows_of(tmp_path / "out/amc.parquet")[0]["answer"] == "0.1"


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "downloads/math500/test.jsonl", [MATH500])
    with pytest.raises(SystemExit) as caught:
        prepare(tmp_path, "math500", "amc", "minerva")
    text = str(caught.value)
    assert "of amc, minerva" in text and "math500" not in text
    downloads = tmp_path / "downloads"
    for name in ("amc", "minerva"):
        command = f"hf download {SETS[name].hub} --repo-type dataset --local-dir {downloads / name}"
        assert command in text
    assert not list((tmp_path / "out").glob("*.parquet"))  # all or none
    assert list(prepare(tmp_path)) == ["math500"]  # no name: what is there


def test_files_of_ones_own_and_their_columns(tmp_path: Path) -> None:
    row = {"task": "6*7", "solution": 42.0, "x": 1, "steps": "6*7=42"}
    path = jsonl(tmp_path / "mine.jsonl", [row] * 2)
    columns = ["--columns", "prompt=task", "answer=solution"]
    command = ["mine", "--file", str(path), "--out", str(tmp_path / "out"), *columns]
    assert main(command) == 0
    expected = {"prompt": "6*7", "answer": "42"}
    assert rows_of(tmp_path / "out/mine.parquet") == [expected]
    assert main([*command, "completion=steps"]) == 0
    assert rows_of(tmp_path / "out/mine.parquet") == [expected | {"completion": "6*7=42"}]
    with pytest.raises(SystemExit, match="completion=steps x=y, expected prompt=COLUMN"):
        main([*command, "completion=steps", "x=y"])


def test_answers_are_what_was_written_or_left_out(tmp_path: Path) -> None:
    """No repr of a list, no 1e-07, no half of a character: a run reads the same."""
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    good = [("a", 1e-7), ("b", 0), ("c", " 4 "), ([{"role": "user", "content": "d"}], "5")]
    bad = [("e", ["1", "2"]), ("f", True), ("g", float("nan")), (5, "1"), (system, "1"),
           ("\ud83d", "1"), ("h", "\ud83d"), ("i", None), ("", "1")]  # fmt: skip
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in good + bad]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    assert main(["mine", "--file", str(path), "--out", str(tmp_path / "out")]) == 0
    expected = {"a": "0.0000001", "b": "0", "c": "4", "d": "5"}
    found = rows_of(tmp_path / "out/mine.parquet")
    assert {row["prompt"]: row["answer"] for row in found} == expected


def test_a_float32_column_has_the_digits_that_it_was_written_with(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"], "answer": pyarrow.array([0.1], pyarrow.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "mine.parquet")
    main(["mine", "--file", str(tmp_path / "mine.parquet"), "--out", str(tmp_path / "out")])
    assert rows_of(tmp_path / "out/mine.parquet") == [{"prompt": "a", "answer": "0.1"}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["../x", "--file", "FILE"], "found the name '../x'"),
        (["a/b", "--file", "FILE"], "found the name 'a/b'"),
        (["x", "--task", "chain_sum", "--size", "-3"], "found --size -3"),
        (["x", "--task", "no_such_task", "--size", "3"], "--task no_such_task: task: found"),
        (["x", "--file", "FILE", "--columns", "prompt"], "--columns: found prompt, expected"),
        (["x", "--file", "FILE", "--out", "FILE"], "--out "),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "mine.jsonl", [{"prompt": "a", "answer": "1"}])
    given = [str(file) if word == "FILE" else word for word in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*given, *out])
    assert says in f"{caught.value} {capsys.readouterr().err}"


def test_a_file_that_is_not_the_tools_stays(tmp_path: Path) -> None:
    jsonl(tmp_path / "downloads/math500/test.jsonl", [MATH500])
    (tmp_path / "out").mkdir()
    precious = tmp_path / "out/math500.parquet"
    precious.write_text("mine")
    with pytest.raises(SystemExit, match="did not write"):
        prepare(tmp_path, "math500")
    assert precious.read_text() == "mine"
    (tmp_path / "out/manifest.json").write_text("[]")
    with pytest.raises(SystemExit, match="no manifest"):
        prepare(tmp_path, "math500")
    precious.unlink()
    (tmp_path / "out/manifest.json").unlink()
    prepare(tmp_path, "math500")
    assert prepare(tmp_path, "math500")["math500"]["rows"] == 1  # its own it replaces


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1\n", "", "[1]"])
@pytest.mark.parametrize("name", ["test.jsonl", "test.parquet", "test.json"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "downloads/math500" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"test\.(json|parquet)|no row is left") as caught:
        prepare(tmp_path, "math500")
    assert not list((tmp_path / "out").glob("*.parquet")), caught.value


def test_a_download_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "downloads/math500/test.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:-100])
    with pytest.raises(SystemExit, match=r"test\.jsonl\.gz: found .*; is it downloaded whole"):
        prepare(tmp_path, "math500")


def test_completions_are_read_as_a_run_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list with the assistant's message is its text; what is none is left out, and counted."""
    message = {"role": "assistant", "content": "6*7=42"}
    given = [[message], "7*6=42", 5, [message, message], [{"role": "user", "content": "?"}], None]
    rows = [{"prompt": f"q{i}", "answer": "42", "steps": one} for i, one in enumerate(given)]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    command = ["mine", "--file", str(path), "--columns", "completion=steps"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = {row["prompt"]: row["completion"] for row in rows_of(tmp_path / "out/mine.parquet")}
    assert found == {"q0": "6*7=42", "q1": "7*6=42", "q5": None}
    out, err = capsys.readouterr()
    assert "1 left out: a completion that is no text (int), 2 left out" in out
    assert "mine.jsonl:3: found a completion that is no text (int)" in err


def test_a_column_of_several_types_is_said(tmp_path: Path) -> None:
    rows = [Problem("q", "1", {"level": 1}), Problem("r", "2", {"level": "Level 2"})]
    with pytest.raises(NotPrepared, match=r"mine\.parquet: found a column of several types"):
        write(tmp_path / "mine.parquet", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["5", "null", "[1]", "{"])
def test_settings_of_a_generator_are_an_object(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--task", "chain_sum", "--size", "2", "--args", given, "--out", str(tmp_path)])
    assert "argument --args: found " in capsys.readouterr().err


def test_problems_of_a_generator(tmp_path: Path) -> None:
    """The same problems as of the source `reasoning_gym`, with what its reward needs."""
    pytest.importorskip("reasoning_gym")
    arguments = ["sums", "--task", "chain_sum", "--size", "5", "--args", '{"max_terms": 2}']
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "sums.parquet")
    assert len(rows) == 5 and all(row["task"] == "chain_sum" for row in rows)
    for row in rows:
        assert json.loads(row["entry"])["answer"] == row["answer"]


def test_neighbouring_seeds_of_a_generator_share_no_problems(tmp_path: Path) -> None:
    """reasoning-gym itself makes problem i from seed + i."""
    pytest.importorskip("reasoning_gym")
    task = ["--task", "chain_sum", "--size", "50", "--args", '{"min_digits": 9, "max_digits": 9}']
    for seed in ("0", "1"):
        assert main([f"sums{seed}", *task, "--seed", seed, "--out", str(tmp_path)]) == 0
    first, second = ({r["prompt"] for r in rows_of(tmp_path / f"sums{n}.parquet")} for n in "01")
    assert len(first | second) == 100


def test_worked_solutions_of_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own function writes them; a name that is none is said with the form it should have."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    Path("steps.py").write_text("def steps(entry):\n    return entry['answer'] + '!'\n")
    task = ["sums", "--task", "chain_sum", "--size", "5", "--out", "out", "--completion"]
    assert main([*task, "steps:steps"]) == 0
    assert all(
        row["completion"] == f"{row['answer']}!" for row in rows_of(Path("out/sums.parquet"))
    )
    with pytest.raises(SystemExit, match=r"--completion: found .*def completion\(entry"):
        main([*task, "steps:none"])
