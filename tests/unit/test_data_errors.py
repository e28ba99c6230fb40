"""Wrong data: every message says where, what was found, what was expected and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made.prompts import make_config, sums

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream, eval_prompts
from sfpo_megatron.data.tokenize import load_tokenizer

GOOD = '{"prompt": "2 + 2 =", "answer": "4"}'
BAD_LINES = {
    "not json": ('{"prompt": "2 +', "expected an object such as"),
    "not utf-8": (b'{"prompt": "\xff", "answer": "4"}', "expected an object such as"),
    "nested beyond reason": ("[" * 100_000, "expected an object such as"),
    "not an object": ('["2 + 2 =", "4"]', "write one object a line"),
    "no answer": ('{"prompt": "2 + 2 ="}', "no key 'answer'"),
    "no prompt": ('{"question": "2 + 2 =", "answer": "4"}', "no key 'prompt'"),
    "prompt is a list": ('{"prompt": ["2"], "answer": "4"}', "prompt = ['2']"),
    "answer is null": ('{"prompt": "2 + 2 =", "answer": null}', "answer = None"),
    "answer is a bool": ('{"prompt": "2 + 2 =", "answer": true}', "answer = True"),
    "empty prompt": ('{"prompt": " ", "answer": "4"}', "not empty"),
    "too long": (json.dumps({"prompt": "2 + " * 100, "answer": "4"}), "rollout.max_prompt_tokens"),
}


def jsonl(tmp_path, *lines, size=None):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines) + b"\n")
    return DataSource(source="jsonl", path=str(file), size=size)


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_bad_line_names_file_and_line(tmp_path, tokenizer, name, split):
    line, says = BAD_LINES[name]
    source = jsonl(tmp_path, GOOD, "", line, GOOD)  # the blank line counts: line 3 is bad
    config = make_config([source]) if split == "train" else make_config([sums(5)], [source])
    with pytest.raises(DataError) as caught:
        (PromptStream if split == "train" else eval_prompts)(config, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{source.path}:3: found ")
    assert says in message and ", expected " in message and "; " in message
    assert len(message) < len(str(source.path)) + 400


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_skipped_and_counted(tmp_path, tokenizer, name):
    source = jsonl(tmp_path, GOOD, "", BAD_LINES[name][0], GOOD)
    stream = PromptStream(make_config([source], on_bad_row="skip"), tokenizer)
    assert [p.id for p in stream.prompts] == ["rows/1", "rows/4"]
    assert "1 bad rows skipped (the first: " in stream.summary and ":3: " in stream.summary


def test_size_takes_the_first_lines(tmp_path, tokenizer):
    source = jsonl(tmp_path, GOOD, GOOD.replace("2 + 2", "1 + 3"), "rubbish", size=2)
    assert len(PromptStream(make_config([source]), tokenizer).prompts) == 2


def test_numbers_as_answers(tmp_path, tokenizer):
    lines = [json.dumps({"prompt": f"p{a}", "answer": a}) for a in (4, 4.0, 4.5, -7, 10**20)]
    stream = PromptStream(make_config([jsonl(tmp_path, *lines)]), tokenizer)
    assert [p.answer for p in stream.prompts] == ["4", "4", "4.5", "-7", "1" + "0" * 20]


def gym(task, args=None):
    return {"source": "reasoning_gym", "task": task, "size": 5, "args": args or {}}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"source": "jsonl", "path": "nowhere.jsonl"}, r"data.train\[0\].path: found 'nowhere"),
        (
            gym("chain_sums"),
            r"data.train\[0\].task: found 'chain_sums'.*did you mean chain_sum",
        ),
        (
            gym("chain_sum", {"max_term": 2}),
            r"data.train\[0\].args.max_term: .*did you mean max_terms\?",
        ),
        (
            gym("chain_sum", {"seed": 2}),
            r"data.train\[0\].args.seed: ",
        ),
        (
            gym("chain_sum", {"min_terms": 0}),
            r"data.train\[0\].args: .*min_terms must be positive",
        ),
        (
            gym("chain_sum", {"min_terms": "two"}),
            r"data.train\[0\].args: found",
        ),
    ],
)
def test_bad_source_names_its_key(source, says, tokenizer):
    with pytest.raises(DataError, match=says):
        PromptStream(make_config([DataSource(**source)]), tokenizer)


def test_too_long_generated_prompt_names_the_entry(tokenizer):
    config = make_config([sums(5)], max_prompt_tokens=8)
    with pytest.raises(DataError, match=r"data.train\[0\] \(reasoning_gym chain_sum entry 0\): "):
        PromptStream(config, tokenizer)
    with pytest.raises(DataError, match=r"found no prompt \(5 bad rows skipped"):
        PromptStream(make_config([sums(5)], max_prompt_tokens=8, on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize("text", ["{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_does_not_load(tmp_path: Path, text: str) -> None:
    """Each kind raises an error of its own, of which none names the file."""
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DataError, match=r"model\.path: found a tokenizer in .*cannot load"):
        load_tokenizer(str(tmp_path))
