"""Records of an evaluation: whole problems or none after a kill, other settings refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.evaluation.records import EvaluationError, Record, Records, settings_in
from sfpo_megatron.host.replacing import set_aside

SETTINGS = {"model": "m", "n": 3, "temperature": 1.0}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfpo_megatron.evaluation.records.PATIENCE_S", 0.0)


def record(problem: str, sample: int) -> Record:
    text = f"{problem} é {sample}\u2028\n"
    return {"problem": problem, "sample": sample, "correct": sample == 1, "text": text}


def problem(name: str) -> list[Record]:
    return [record(name, sample) for sample in range(3)]


def opened(path: Path, **changes: Any) -> Records:
    return Records(path / "m", {**SETTINGS, **changes}, n=3)


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        assert records.problems == {}
        records.add(problem("a") + problem("b"))
        records.add(problem("c"))
    with opened(tmp_path) as again:
        assert again.problems == {name: problem(name) for name in "abc"}
        again.add(problem("d"))
    with opened(tmp_path) as third:
        assert list(third.problems) == ["a", "b", "c", "d"]


def test_a_file_cut_anywhere_holds_its_whole_problems(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        for name in "abc":
            records.add(problem(name))
    file = tmp_path / "m/records.jsonl"
    text = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    for cut in range(0, len(text) + 1, 7):
        file.write_bytes(text[:cut])
        whole = sum(end <= cut for end in ends) // 3
        with opened(tmp_path) as again:
            assert list(again.problems) == ["a", "b", "c"][:whole], cut
            again.add(problem("z"))
        lines = [json.loads(line) for line in file.read_text().split("\n") if line]
        assert [line["problem"] for line in lines] == [
            n for n in ["a", "b", "c"][:whole] for _ in "123"
        ] + ["z"] * 3


@pytest.mark.parametrize("changed", [{"n": 4}, {"temperature": 0.5}, {"model": None}])
def test_other_settings_are_refused_and_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    with opened(tmp_path) as records:
        records.add(problem("a"))
    (name,) = changed
    with (
        pytest.raises(EvaluationError, match=f"{name} .* -> .*--fresh"),
        opened(tmp_path, **changed),
    ):
        pass
    with opened(tmp_path) as again:
        assert list(again.problems) == ["a"]


def test_records_whose_version_kept_fewer_settings_are_refused(tmp_path: Path) -> None:
    """Whether they were made with the same ones nobody can tell."""
    with opened(tmp_path) as records:
        records.add(problem("a"))
    with pytest.raises(EvaluationError) as raised, opened(tmp_path, later=None, also=1):
        pass
    assert str(raised.value) == (
        f"{tmp_path / 'm'}: found records made with unknown settings (their version did not record "
        "also, later), expected the same settings; choose another --out, or set them aside with "
        "--fresh"
    )
    both = r"other settings \(n 3 -> 4\) and unknown settings \(.* later\)"
    with pytest.raises(EvaluationError, match=both), opened(tmp_path, n=4, later=None):
        pass


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with (
        opened(tmp_path),
        pytest.raises(EvaluationError, match="another evaluation"),
        opened(tmp_path),
    ):
        pass
    with opened(tmp_path):
        pass


def test_one_that_ends_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfpo_megatron.evaluation.records.PATIENCE_S", 60.0)
    first = opened(tmp_path).__enter__()
    first.add(problem("a"))
    threading.Timer(0.5, first.__exit__, (None, None, None)).start()
    with opened(tmp_path) as second:
        assert list(second.problems) == ["a"]


def test_fresh_does_not_take_the_folder_of_one_at_work(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        records.add(problem("a"))
        with (
            pytest.raises(EvaluationError, match="another evaluation"),
            Records(tmp_path / "m", {"n": 9}, n=3, fresh=True),
        ):
            pass
        records.add(problem("b"))
    with opened(tmp_path) as again:
        assert list(again.problems) == ["a", "b"]
    with Records(tmp_path / "m", {"n": 9}, n=3, fresh=True) as new:
        assert new.problems == {} and new.previous == tmp_path / "m.previous-1"


@pytest.mark.parametrize("content", ["{", "3", "[1]"])
def test_settings_that_are_no_object_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/settings.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"settings\.json"), opened(tmp_path):
        pass


def test_set_aside_deletes_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        with opened(tmp_path, n=number) as records:
            records.add(problem("a"))
        aside = set_aside(tmp_path / "m", "previous")
        assert aside == tmp_path / f"m.previous-{number}"
        assert json.loads((aside / "settings.json").read_text())["n"] == number


WHOLE = {
    "source": "x", "reward": 1, "correct": True, "answer": None, "parts": {}, "num_tokens": 3,
    "truncated": False, "question": "q\u2028", "text": "t\u0085",
}  # fmt: skip


def write_records(folder: Path, changes: dict[str, Any], *, lacks: str = "") -> None:
    """Three samples of problem `a`, the last changed, as somebody may write them: not in ASCII."""
    (folder / "m").mkdir()
    samples = [WHOLE | {"problem": "a", "sample": number} for number in range(3)]
    samples[2] = {k: v for k, v in (samples[2] | changes).items() if k != lacks}
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / "m/records.jsonl").write_text(lines, "utf-8")


def test_records_in_other_letters_are_kept(tmp_path: Path) -> None:
    """U+2028 ends no line of JSON."""
    write_records(tmp_path, {})
    with opened(tmp_path) as records:
        records.require_figures()
        assert [sample["question"] for sample in records.problems["a"]] == ["q\u2028"] * 3


@pytest.mark.parametrize(
    ("changes", "lacks", "name"),
    [
        *(({}, name, name) for name in ("source", "answer", "num_tokens", "truncated", "parts")),
        *(({"num_tokens": None}, "", "num_tokens"), ({"num_tokens": True}, "", "num_tokens")),
        *(({"correct": 1}, "", "correct"), ({"reward": "1"}, "", "reward")),
        *(({"answer": 3}, "", "answer"), ({"source": None}, "", "source")),
    ],
)
def test_a_record_without_what_the_figures_need_is_named(
    tmp_path: Path, changes: dict[str, Any], lacks: str, name: str
) -> None:
    """An earlier version wrote it, or somebody edited it: said before an engine starts, and nothing
    is lost."""
    write_records(tmp_path, changes, lacks=lacks)
    found = rf"records\.jsonl: found sample 2 of problem 'a' without a usable {name}, .*--fresh"
    with opened(tmp_path) as records, pytest.raises(EvaluationError, match=found):
        records.require_figures()
    with opened(tmp_path) as again:
        assert len(again.problems["a"]) == 3


def test_the_date_is_kept_and_compared_by_the_prompts_alone(tmp_path: Path) -> None:
    """Records of versions that kept none go on, too."""
    assert settings_in(tmp_path / "m") is None
    with opened(tmp_path, date="2026-01-31T23:59:00") as records:
        records.add(problem("a"))
    found = settings_in(tmp_path / "m")
    assert found is not None and found["date"] == "2026-01-31T23:59:00"
    for date in ({}, {"date": "2026-02-01T00:01:00"}):
        with opened(tmp_path, **date) as again:
            assert list(again.problems) == ["a"]
    with opened(tmp_path / "old"):
        pass
    with opened(tmp_path / "old", date="2026-02-01T00:01:00") as again:
        assert again.problems == {}
