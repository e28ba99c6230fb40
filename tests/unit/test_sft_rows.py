"""A warm start and its rows: what is held out, epochs, the cursor, dates, repeats.

Tokenizers are real ones of transformers, trained on the spot. Not exercised: pretrained tokenizers.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config
from made.conversations import CHATML, ENDS, TEMPLATES, chat, config_of, rows_of

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream, SFTExamples

SKIP = {"on_bad_row": "skip"}


def test_a_share_is_held_out_by_its_question(tokenizer: Any, tmp_path: Path) -> None:
    def split(rows: list[dict[str, Any]], seed: int) -> tuple[set[str], set[str]]:
        sft = {"holdout": 0.25, "eval_every": 1}
        examples = SFTExamples(config_of(tmp_path, rows, sft=sft, seed=seed), tokenizer)
        learned = examples.next_batch(len(examples))
        return tuple(  # type: ignore[return-value]
            {tokenizer.decode(e.prompt_ids) for e in part} for part in (learned, examples.held_out)
        )

    learned, held_out = split(rows_of(400), 0)
    assert not learned & held_out and len(learned | held_out) == 400
    assert 60 < len(held_out) < 140  # 100 within five standard deviations
    assert split(list(reversed(rows_of(400))), 7) == (learned, held_out)
    again = [{**row, "prompt": f" {row['prompt']}  "} for row in rows_of(400)]
    assert {text.strip() for text in split(again, 0)[1]} == held_out


def test_held_out_rows_of_data_eval(template: Any, tmp_path: Path) -> None:
    """Rows without a reference too; nobody learns from their questions."""
    tokenizer = template(CHATML)
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps(chat(f"1 + {i} =", "2")) + "\n" for i in range(3)))
    data = {"eval": (DataSource(source="jsonl", path=str(exam)),)}
    config = config_of(tmp_path, rows_of(9), data=data, sft={"eval_every": 5})
    examples = SFTExamples(config, tokenizer)
    assert (len(examples), len(examples.held_out)) == (6, 3)
    off = SFTExamples(config_of(tmp_path, rows_of(9), data=data), tokenizer)
    assert (len(off), len(off.held_out)) == (6, 0)
    with pytest.raises(DataError, match=r"data\.eval: found no row for the held-out loss"):
        SFTExamples(config_of(tmp_path, rows_of(9), sft={"eval_every": 5}), tokenizer)


@pytest.mark.parametrize("per_step", [4, 10, 25])
def test_each_epoch_has_every_example_once(per_step: int, tokenizer: Any, tmp_path: Path) -> None:
    sft = {"num_epochs": 3, "examples_per_step": per_step}
    config = config_of(tmp_path, rows_of(10), sft=sft)
    examples = SFTExamples(config, tokenizer)
    batches = [examples.next_batch(per_step) for _ in range(-(-30 // per_step))]
    drawn = [e.prompt_ids for batch in batches for e in batch]
    assert len(drawn) == 30 and [len(b) for b in batches[:-1]] == [per_step] * (len(batches) - 1)
    for epoch in range(3):
        assert len(set(drawn[epoch * 10 : epoch * 10 + 10])) == 10


def test_the_cursor_goes_on_where_it_was(template: Any, tmp_path: Path) -> None:
    """Through a file that was renamed; a row whose completion has changed is another row."""
    tokenizer = template(CHATML)
    rows = [{**row, "completion": f"It is {row['answer']}."} for row in rows_of(7)]
    rows.append(chat("What?", "It is 0."))
    first = SFTExamples(config_of(tmp_path, rows), tokenizer)
    drawn = [first.next_batch(3) for _ in range(6)]
    again = SFTExamples(config_of(tmp_path, rows), tokenizer)
    for batch in drawn[:3]:
        assert again.next_batch(3) == batch
    state = json.loads(json.dumps(again.stream.state_dict()))
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text((tmp_path / "rows.jsonl").read_text())
    renamed = run_config(data={"train": (DataSource(source="jsonl", path=str(elsewhere)),)})
    resumed = SFTExamples(renamed, tokenizer)
    resumed.stream.load_state_dict(state)
    assert [resumed.next_batch(3) for _ in range(3)] == drawn[3:]
    for changed in ({**rows[2], "completion": "It is 9."}, chat("What?", "It is 1.")):
        others = [*rows[:2], changed, *rows[3:]] if "prompt" in changed else [*rows[:7], changed]
        other = SFTExamples(config_of(tmp_path, others), tokenizer)
        assert other.stream.difference(state)


# ---- what sft has in common with train -----------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


@pytest.mark.parametrize("row", [chat("1 + 1 =", "2"), {"prompt": "1 + 1 =", "answer": "2"}])
@pytest.mark.parametrize("written", [DATED, DATED.replace(CHATML, TEMPLATES["marks, trimmed"])])
def test_the_date_stays_that_of_the_first_start(
    row: dict[str, Any], written: str, template: Any, tmp_path: Path
) -> None:
    """In a conversation too, however its turns are found; the next day's resume learns the same."""
    tokenizer = template(written)
    config = config_of(tmp_path, [row], data={"chat_template": True})
    then = SFTExamples(config, tokenizer, now="2026-01-31T23:59:00")
    state = json.loads(json.dumps(then.stream.state_dict()))
    assert "2026-01-31T23:59:00" in then.summary
    (first,) = then.next_batch(1)
    assert tokenizer.decode(first.prompt_ids).startswith("31 Jan 2026")
    again = SFTExamples(config, tokenizer, now=state["now"])
    assert again.stream.difference(state) == "" and again.next_batch(1) == [first]
    assert SFTExamples(config, tokenizer).stream.difference(state) != ""


def test_variables_of_the_template_are_for_conversations_too(template: Any, tmp_path: Path) -> None:
    tokenizer = template("{{ 'quick ' if enable_thinking is false }}" + CHATML)
    args = {"chat_template": True, "chat_template_args": {"enable_thinking": False}}
    (example,) = SFTExamples(
        config_of(tmp_path, [chat("1 + 1 =", "2")], data=args), tokenizer
    ).next_batch(1)
    assert tokenizer.decode(example.prompt_ids).startswith("quick <|im_start|>user")


def test_a_row_that_repeats_is_learned_from_once(template: Any, tmp_path: Path) -> None:
    """Another worked solution of a question is no repeat, and nothing to be told of; of rows with
    a completion the answer counts for nothing."""
    rows = [
        {"prompt": "1 + 1 =", "completion": "It is 2.", "answer": "2"},
        {"prompt": " 1 +  1 =", "completion": "It is 2."},
        {"prompt": "1 + 1 =", "completion": "One and one: 2.", "answer": "2"},
        {"prompt": "1 + 1 =", "answer": "2"},
        chat("1 + 1 =", "2", system="Add."),
        chat("1 + 1 =", "2", system="Add."),
        chat("1 + 1 =", "2"),
    ]
    examples = SFTExamples(config_of(tmp_path, rows), template(CHATML))
    assert [row.id for row in examples.stream.prompts.rows] == [
        f"rows/{n}" for n in (1, 3, 4, 5, 7)
    ]
    assert "2 rows repeated an earlier one" in examples.summary
    assert "differently" not in examples.summary


def test_a_bad_completion_is_no_repeat(template: Any, tmp_path: Path) -> None:
    """Each is reported."""
    rows = [{"prompt": "1 + 1 =", "answer": "2", "completion": 7}] * 2 + rows_of(1)
    examples = SFTExamples(config_of(tmp_path, rows, data=SKIP), template(CHATML))
    assert len(examples) == 1 and "2 bad rows skipped" in examples.summary


def test_bad_rows_of_both_are_one_report(template: Any, tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps(chat("1 + 5 =", "6")) + "\n{\n")
    data = {"eval": (DataSource(source="jsonl", path=str(exam)),)}
    rows = [*rows_of(2), {"prompt": "1 + 9 =", "answer": "2", "completion": 7}]
    config = config_of(tmp_path, rows, data=data, sft={"eval_every": 5})
    with pytest.raises(DataError) as caught:
        SFTExamples(config, template(CHATML))
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines[:2]] == [
        "rows.jsonl:3",
        "exam.jsonl:2",
    ]
    assert lines[2].startswith("2 bad rows ")


@pytest.mark.parametrize("per_step", [4, 15, 40])
def test_epochs_by_weights(per_step: int, tokenizer: Any, tmp_path: Path) -> None:
    """An epoch has half of the lighter source, and the last step ends with the last epoch."""
    sources = []
    for name, first, weight in (("heavy", 0, 1.0), ("light", 50, 0.5)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"1 + {first + n} =", "answer": str(first + n)} for n in range(10)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(DataSource(source="jsonl", path=str(file), weight=weight))
    sft = {"num_epochs": 2, "examples_per_step": per_step}
    examples = SFTExamples(run_config(data={"train": tuple(sources)}, sft=sft), tokenizer)
    assert (len(examples), examples.epoch_size) == (20, 15)
    batches = [examples.next_batch(per_step) for _ in range(-(-30 // per_step))]
    drawn = [e.prompt_ids for batch in batches for e in batch]
    assert len(drawn) == 30 and len(set(drawn)) == 20
    assert len(set(drawn[:15])) == len(set(drawn[15:])) == 15


@pytest.mark.parametrize(
    "more",
    [
        {"answer": "3", "extra_info": {"level": 1}},
        {"answer": "3", "extra_info": None},
        {"extra_info": {"level": 1}},
    ],
)
def test_a_completion_is_learned_whatever_column_is_the_metadata(
    more: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    config = config_of(
        tmp_path,
        [{"prompt": "1 + 2 =", "completion": "It is 3.", **more}],
        columns={"metadata": "extra_info"},
    )
    (example,) = SFTExamples(config, tokenizer).next_batch(1)
    assert tokenizer.decode(example.response_ids[:-1]) == "It is 3."


def test_a_completion_with_a_date_beside_its_content(tokenizer: Any, tmp_path: Path) -> None:
    """Its column is left out of what is read: the bare answer is not learned in its place."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    message = {"role": "assistant", "content": "1 is 1.", "timestamp": datetime(2026, 1, 31)}
    row = {"prompt": "1", "answer": "1", "completion": [message]}
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    source = DataSource(source="parquet", path=str(file))
    with pytest.raises(DataError, match=r"rows.parquet.*:1: found a completion that JSON cannot"):
        SFTExamples(run_config(data={"train": (source,)}), tokenizer)


@pytest.mark.parametrize(("end", "added"), [("", 1), ("<|endoftext|>", 0), (ENDS, 0)])
def test_a_text_that_ends_a_generation_is_ended_once(
    end: str, added: int, template: Any, tmp_path: Path
) -> None:
    """Many sets of prompts and completions bring the token along."""
    tokenizer = template(CHATML)
    config = config_of(tmp_path, [{"prompt": "1 + 2 =", "completion": f"3{end}"}])
    stop_ids = tokenizer.convert_tokens_to_ids([ENDS])
    (example,) = SFTExamples(config, tokenizer, stop_ids=stop_ids).next_batch(1)
    (three,) = tokenizer("3", add_special_tokens=False)["input_ids"]
    ends = [tokenizer.eos_token_id] if added else tokenizer.convert_tokens_to_ids([end])
    assert example.response_ids == (three, *ends)


def test_a_null_answer_is_for_sft_alone(tokenizer: Any, tmp_path: Path) -> None:
    """Every row of a table has the column."""
    rows = [*rows_of(1), {"prompt": "2 + 2 =", "completion": "It is 4.", "answer": None}]
    assert len(SFTExamples(config_of(tmp_path, rows), tokenizer)) == 2
    with pytest.raises(DataError, match=r"rows.jsonl:2: found answer = None") as raised:
        PromptStream(config_of(tmp_path, rows), tokenizer)
    assert raised.value.kind == "without answer"
