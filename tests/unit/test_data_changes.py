"""A resume on data that has changed: what is said of it, and where the cursor goes on.

The tokenizer is a real transformers one, trained on the spot. Not exercised: a whole run
(tests/e2e/test_cli_data_change.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.prompts import make_config, sums

from sfpo_megatron.checkpoints.identity import RunRecord
from sfpo_megatron.checkpoints.store import Found
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream
from sfpo_megatron.data.prompts import fingerprint_of_before
from sfpo_megatron.data.remembered import Remembered, compare
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.feed import EngineFeed
from sfpo_megatron.run.same_data import hold_to_data

Rows = list[dict[str, Any]]


def some_rows(count: int = 20, first: int = 0) -> Rows:
    return [
        {"prompt": f"What is {i} + 1?", "answer": str(i + 1), "level": i}
        for i in range(first, first + count)
    ]


class Data:
    """A run on a file of rows, whose checkpoint is taken after `drawn` prompts."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.directory = RunDirectory.of(folder / "run")
        RunRecord.new(run_id="abc").write(self.directory)
        self.found = Found(directory=folder / "step_0000007", step=7, has_run_state=True)

    def stream(
        self, *files: Rows, names: Sequence[str] = ("mine", "yours"), **config: Any
    ) -> PromptStream:
        sources = []
        for rows, name in zip(files, names, strict=False):
            file = self.folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" if row else "\n" for row in rows))
            sources.append(DataSource(source="jsonl", path=str(file)))
        return PromptStream(make_config(sources, **config), self.tokenizer)

    def saved(self, stream: PromptStream, *names: str) -> dict[str, Any]:
        """run_state.json, through JSON."""
        paths = [{"source": "jsonl", "path": f"/there/{name}.jsonl"} for name in names or ("mine",)]
        state = {
            "data": {"prompts": stream.state_dict()},
            "config": {"data": {"train": paths, "eval": []}},
        }
        return json.loads(json.dumps(state))  # type: ignore[no-any-return]

    def resume(self, stream: PromptStream, state: dict[str, Any], *, accept: bool = False) -> str:
        said = hold_to_data(stream, self.found, state, self.directory, accept=accept)
        stream.load_state_dict(state["data"]["prompts"])
        return said

    def refused(self, stream: PromptStream, state: dict[str, Any]) -> str:
        with pytest.raises(DataError, match="--accept-data-change") as error:
            hold_to_data(stream, self.found, state, self.directory, accept=False)
        assert "\n" not in str(error.value) and len(str(error.value)) < 560
        with pytest.raises(DataError, match="--accept-data-change"):
            stream.load_state_dict(state["data"]["prompts"])
        return str(error.value)


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> Data:
    return Data(tmp_path, tokenizer)


def swapped(rows: Rows) -> Rows:
    return [rows[1], rows[0], *rows[2:]]


CHANGES: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "gone": (lambda r: [*r[:4], *r[5:]], "found 1 row is gone (data.train[0] row 5),"),
    "all but two gone": (
        lambda r: r[:2],
        "found 18 rows are gone (data.train[0] row 3; data.train[0] row 4; ...),",
    ),
    "added": (
        lambda r: [*r, *some_rows(22)[20:]],
        "2 rows are new (mine/21 'What is 20 + 1?'; mine/22 'What is 21 + 1?')",
    ),
    "answer": (
        lambda r: [*r[:3], r[3] | {"answer": "5"}, *r[4:]],
        "found 1 answer has changed (mine/4 'What is 3 + 1?' is now '5'), expected",
    ),
    "question": (
        lambda r: [r[0] | {"prompt": "What is 1 + 0?"}, *r[1:]],
        "found 1 question has changed (mine/1 'What is 1 + 0?'),",
    ),
    "order": (swapped, "found 2 rows have other ids (mine/1 'What is 1 + 1?'"),
    "order, said": (swapped, "1 row stands elsewhere (mine/1 'What is 1 + 1?')"),
    "ids": (lambda r: [{}, *r], "found 20 rows have other ids (mine/2 'What is 0 + 1?'; mine/3"),
    "system": (
        lambda r: [{**r[0], "prompt": [{"role": "system", "content": "Add."},
                                       {"role": "user", "content": r[0]["prompt"]}]}, *r[1:]],
        "found 1 prompt has other tokens (mine/1 'What is 0 + 1?'),",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_refused(data: Data, name: str) -> None:
    change, says = CHANGES[name]
    state = data.saved(data.stream(some_rows()))
    message = data.refused(data.stream(change(some_rows())), state)
    assert says in message and message.startswith("data.train, against step_0000007: found ")
    record = RunRecord.read(data.directory)
    assert record is not None and record.data_changes == ()


def test_a_change_of_many_kinds_stays_on_a_line(data: Data) -> None:
    state = data.saved(data.stream(some_rows()))
    rows = some_rows(40)[2:]
    rows[3]["answer"], rows[4]["prompt"] = "no", "What else is there?" * 3
    message = data.refused(data.stream(rows), state)
    for says in ("rows are gone", "rows are new", "answer has changed"):
        assert says in message


def test_the_suffix_is_data_too(data: Data) -> None:
    state = data.saved(data.stream(some_rows()))
    message = data.refused(data.stream(some_rows(), prompt_suffix="!"), state)
    assert "found 20 prompts have other tokens" in message


@pytest.mark.parametrize(
    "same",
    [
        lambda d: d.stream(some_rows(), some_rows(9, 50), names=("renamed", "too")),
        lambda d: d.stream([r | {"level": "other"} for r in some_rows()], some_rows(9, 50)),
        lambda d: d.stream(some_rows(), some_rows(9, 50), names=("yours", "mine")),
    ],
)
def test_names_and_further_columns_are_no_data(data: Data, same: Any) -> None:
    """And ids, which sampling seeds are made of, stay what they were: here and ever after."""
    stream = data.stream(some_rows(), some_rows(9, 50))
    stream.next_batch(11)
    state = data.saved(stream, "mine", "yours")
    again = same(data)
    assert data.resume(again, state) == ""
    later = same(data)
    assert data.resume(later, data.saved(again, "renamed", "too")) == ""
    for _ in range(4):
        ids = [p.id for p in stream.next_batch(7)]
        assert ids == [p.id for p in again.next_batch(7)] == [p.id for p in later.next_batch(7)]
    assert RunRecord.read(data.directory) == RunRecord.read(data.directory)


def test_names_of_held_out_sources_stay_too(data: Data, tokenizer: Any) -> None:
    def stream(name: str) -> PromptStream:
        file = data.folder / f"{name}.jsonl"
        file.write_text(json.dumps(some_rows(30)[29]) + "\n")
        held_out = [DataSource(source="jsonl", path=str(file))]
        (data.folder / "mine.jsonl").write_text(json.dumps(some_rows(1)[0]))
        mine = DataSource(source="jsonl", path=str(data.folder / "mine.jsonl"))
        return PromptStream(make_config([mine], held_out), tokenizer)

    state, later = data.saved(stream("exam")), stream("other")
    assert later.eval_names == ["eval.other"]
    assert data.resume(later, state) == "" and later.eval_names == ["eval.exam"]
    last = stream("third")
    assert data.resume(last, data.saved(later)) == "" and last.eval_names == ["eval.exam"]
    del state["data"]["prompts"]["eval_names"]  # the format before: by its config
    state["config"]["data"]["eval"] = [{"source": "jsonl", "path": "/there/exam.jsonl"}]
    assert data.resume(last, state) == "" and last.eval_names == ["eval.exam"]


def of_before(stream: PromptStream, state: dict[str, Any]) -> dict[str, Any]:
    """The same state as commit dcc1758 wrote it."""
    cursor = {key: state["data"]["prompts"][key] for key in ("epoch", "position", "seed")}
    cursor["fingerprint"] = fingerprint_of_before(stream.prompts)
    return state | {"data": {"prompts": cursor}}


@pytest.mark.parametrize("name", ["mine", "renamed"])
def test_a_checkpoint_of_the_format_before_continues(data: Data, name: str) -> None:
    stream = data.stream(some_rows())
    stream.next_batch(5)
    state = of_before(stream, data.saved(stream))
    again = data.stream(some_rows(), names=(name,))
    assert data.resume(again, state) == ""
    for _ in range(5):
        assert again.next_batch(7) == stream.next_batch(7)


def test_the_fingerprint_of_the_format_before() -> None:
    """The value is what commit dcc1758 computes for two prompts."""
    prompts: Any = [
        SimpleNamespace(id="sums/1", token_ids=(5, 6)),
        SimpleNamespace(id="sums/2", token_ids=(7,)),
    ]
    assert fingerprint_of_before(prompts) == "1691469844fd989b"


def test_other_data_under_a_checkpoint_of_the_format_before(data: Data) -> None:
    stream = data.stream(some_rows())
    stream.next_batch(5)
    state = of_before(stream, data.saved(stream))
    message = data.refused(data.stream(some_rows(19)), state)
    assert "found other prompts (that checkpoint, of the format before, cannot" in message
    accepted = data.stream(some_rows(19))
    assert "other prompts" in data.resume(accepted, state, accept=True)
    assert accepted.state_dict()["position"] == 5


def test_the_epoch_under_way_goes_on_without_what_is_gone(data: Data) -> None:
    """Nothing is drawn twice in it, what was left keeps its order, what is new comes last; the
    epochs after are shuffles of all."""
    stream = data.stream(some_rows())
    drawn = [p.question for p in stream.next_batch(8)]
    state = data.saved(stream)
    rest = [p.question for p in stream.next_batch(12)]
    gone = {drawn[2], rest[0], rest[5]}
    rows = [r for r in some_rows() if r["prompt"] not in gone]
    rows = [*some_rows(23)[20:], *reversed(rows)]
    rows[7]["answer"] = "another"
    new = {r["prompt"] for r in rows[:3]}
    again = data.stream(rows)
    said = data.resume(again, state, accept=True)
    assert "3 rows are gone" in said and "3 rows are new" in said and "1 answer has changed" in said
    assert again.state_dict()["position"] == 7
    found = [p.question for _ in range(13) for p in again.next_batch(1)]
    assert found[:10] == [q for q in rest if q not in gone] and set(found[10:]) == new
    plain = data.stream(rows)
    plain.load_state_dict(plain.state_dict() | {"epoch": 1, "position": 0})
    assert again.next_batch(4) == plain.next_batch(4)
    resumed = data.stream(rows)
    assert data.resume(resumed, data.saved(again)) == ""
    assert again.next_batch(16) == plain.next_batch(16) == resumed.next_batch(16)


def test_what_was_accepted_is_saved_and_remembered(data: Data) -> None:
    """A second start before the next checkpoint needs no option again; one after it goes on in the
    same order; another change needs the option."""
    stream = data.stream(some_rows())
    stream.next_batch(3)
    state = data.saved(stream)
    rows = some_rows()[1:]
    first, second = data.stream(rows), data.stream(rows)
    said = data.resume(first, state, accept=True)
    assert said.startswith("the data has changed since step 7, accepted: 1 row is gone (data.train")
    assert data.resume(second, state) == said
    first.next_batch(4)
    third = data.stream(rows)
    assert data.resume(third, data.saved(first)) == ""
    second.next_batch(4)
    for _ in range(6):
        ids = [p.id for p in first.next_batch(5)]
        assert ids == [p.id for p in second.next_batch(5)] == [p.id for p in third.next_batch(5)]
    record = RunRecord.read(data.directory)
    assert record is not None and len(record.data_changes) == 1
    (change,) = record.data_changes
    assert change["after_step"] == 7 and "1 row is gone" in change["what"]
    data.refused(data.stream(rows[1:]), state)


def test_what_was_known_of_prompts_is_let_go(data: Data) -> None:
    """data.skip_zero_variance goes by ids, which are of other rows once one is gone."""

    def feed(rows: Rows) -> EngineFeed:
        config = make_config([DataSource(source="jsonl", path="unused")], skip_zero_variance=True)
        client: Any = None
        streams.append(data.stream(rows))
        return EngineFeed(config, client, streams[-1])

    streams: list[PromptStream] = []
    history = {"base": {"solved": 0.4, "failed": 0.6}, "streaks": {"mine/1": 2}}
    state = data.saved(data.stream(some_rows()))
    state["data"] |= {"history": history, "held": {}, "rollouts": {}}
    same, other = feed(some_rows()), feed(some_rows()[1:])
    same.load_state_dict(state["data"])
    assert same.state_dict()["history"] == history
    streams[-1].accept(state["data"]["prompts"])
    other.load_state_dict(state["data"])
    assert other.state_dict()["history"]["streaks"] == {}


def test_random_changes_twice_in_an_epoch(data: Data) -> None:
    """Every row that is there at the end is drawn at most once an epoch, and every row that was
    there all the time exactly once."""
    for seed in range(12):
        draw = random.Random(seed)
        rows, pool = some_rows(15), some_rows(60)[15:]
        always = {r["prompt"] for r in rows}
        stream, seen = data.stream(rows), list[str]()
        for _ in range(2):
            seen += [p.question for _ in range(4) for p in stream.next_batch(1)]
            state = data.saved(stream)
            rows = draw.sample(rows, k=len(rows) - draw.randrange(3))
            for _ in range(draw.randrange(3)):
                rows.insert(draw.randrange(len(rows)), pool.pop())
            always &= {r["prompt"] for r in rows}
            stream = data.stream(rows)
            data.resume(stream, state, accept=True)
        while stream.state_dict()["epoch"] == 0:
            left = len(rows) - stream.state_dict()["position"]
            seen += [p.question for _ in range(left) for p in stream.next_batch(1)]
            stream.next_batch(1)
        assert len(seen) == len(set(seen)) and always <= set(seen), seed


def test_another_seed_is_refused_whatever_is_accepted(data: Data) -> None:
    state = data.saved(data.stream(some_rows()))
    with pytest.raises(DataError, match="found seed 0, expected 1"):
        data.resume(data.stream(some_rows(), seed=1), state, accept=True)


def test_rows_that_are_there_twice() -> None:
    """With the same answer and with another: as many are gone as are."""

    def remembered(*rows: tuple[str, str]) -> Remembered:
        prompts: Any = [
            SimpleNamespace(id=f"mine/{n}", question=question, answer=answer, token_ids=(1,))
            for n, (question, answer) in enumerate(rows)
        ]
        return Remembered.of(prompts, ["mine"])

    a, b, c = ("x", "1"), ("x", "2"), ("y", "1")
    assert compare(remembered(a, a, c), remembered(a, c)).gone == [1]
    assert compare(remembered(a, c), remembered(a, c, a)).added == [2]
    other = compare(remembered(a, b, c), remembered(b, c))
    assert (other.gone, other.answers, other.place) == ([0], [], {1: 0, 2: 1})
    assert compare(remembered(a, a), remembered(a, b)).answers == [1]
    state = json.loads(json.dumps(remembered(a, b, c).state))
    assert Remembered.from_state(state) == remembered(a, b, c)


def test_a_generated_source_with_other_settings(tokenizer: Any, data: Data) -> None:
    stream = PromptStream(make_config([sums(30)]), tokenizer)
    state = {
        "data": {"prompts": stream.state_dict()},
        "config": {"data": {"train": [], "eval": []}},
    }
    more = PromptStream(make_config([sums(31)]), tokenizer)
    assert "found 1 row is new (chain_sum/30" in data.refused(more, state)


def test_what_a_checkpoint_keeps_is_small(data: Data) -> None:
    state = data.stream(some_rows(2000)).state_dict()
    assert len(json.dumps(state)) < 28 * 2000
