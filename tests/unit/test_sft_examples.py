"""What a warm start learns from: completions, conversations, masks, lengths, held-out rows, epochs.

Tokenizers are real ones of transformers, trained on the spot, with templates in the forms that
models ship. Not exercised: pretrained tokenizers, the loss (tests/dist/test_warm_start.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.data import DataError, PromptStream, SFTExample, SFTExamples

ENDS = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}MARK{% endgeneration %}REST"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
)
TEMPLATES = {
    "prefixes": CHATML,
    "prefixes, stripped": CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
    # Qwen3 writes an empty thought before an answer that has none.
    "prefixes, a thought": CHATML.replace(
        "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
    ),
    "marks with the end": MARKED.replace("MARK", "{{ m.content }}<|im_end|>").replace("REST", "\n"),
    "marks with the line": MARKED.replace("MARK", "{{ m.content }}<|im_end|>\n").replace(
        "REST", ""
    ),
    "marks of the text": MARKED.replace("MARK", "{{ m.content }}").replace("REST", "<|im_end|>\n"),
    "marks, trimmed": MARKED.replace("MARK", "{%- generation -%}").replace(
        "{% generation %}{%- generation -%}", "{%- generation -%}{{ m.content }}<|im_end|>"
    ).replace("REST", "\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    from sfpo_megatron.demo.tiny_model import train_tokenizer

    tokenizer = train_tokenizer(["What is 1 + 2 - 3? It is 0. ÄÖ"] * 4, 383)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ENDS]})
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def template(chat_tokenizer: Any) -> Iterator[Any]:
    """A function that sets the chat template."""

    def use(text: str | None) -> Any:
        chat_tokenizer.chat_template = text
        return chat_tokenizer

    yield use
    chat_tokenizer.chat_template = None


def config_of(folder: Path, rows: list[Any], **sections: Any) -> RunConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": (DataSource(source="jsonl", path=str(file)),), **sections.pop("data", {})}
    return run_config(data=data, **sections)


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def learned(tokenizer: Any, example: SFTExample) -> list[str]:
    """The texts of the learned runs of tokens."""
    runs: list[list[int]] = []
    before = False
    for token, is_learned in zip(example.response_ids, example.learned, strict=True):
        if is_learned and not before:
            runs.append([])
        if is_learned:
            runs[-1].append(token)
        before = is_learned
    return [tokenizer.decode(run) for run in runs]


def only(examples: SFTExamples) -> SFTExample:
    (example,) = examples.next_batch(1)
    return example


# ---- one turn -----------------------------------------------------------------------------------

ONE_TURN: dict[str, tuple[dict[str, Any], str]] = {
    "the completion": ({"completion": "1 + 2 is 3.", "answer": "3"}, "1 + 2 is 3."),
    "without an answer": ({"completion": "It is 3."}, "It is 3."),
    "a message": ({"completion": [{"role": "assistant", "content": "It is 3."}]}, "It is 3."),
    "the answer": ({"answer": "3"}, "3"),
    "a null completion": ({"completion": None, "answer": 3}, "3"),
    "an empty completion": ({"completion": "", "answer": "3"}, "3"),
    "verl's reference": (
        {"reward_model": {"ground_truth": "3"}, "completion": "It is 3"},
        "It is 3",
    ),
}


@pytest.mark.parametrize("case", ONE_TURN)
def test_one_turn(case: str, tokenizer: Any, tmp_path: Path) -> None:
    row, text = ONE_TURN[case]
    config = config_of(tmp_path, [{"prompt": "1 + 2 =", **row}])
    example = only(SFTExamples(config, tokenizer))
    assert tokenizer.decode(example.prompt_ids) == "1 + 2 ="
    assert example.response_ids[-1] == tokenizer.eos_token_id and all(example.learned)
    assert tokenizer.decode(example.response_ids[:-1]) == text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 2 =", "completion": "It is 3."},
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
    ],
)
def test_a_row_without_a_reference_is_for_sft_alone(
    row: dict[str, Any], template: Any, tmp_path: Path
) -> None:
    tokenizer = template(CHATML)
    config = config_of(tmp_path, [row, {"prompt": "1 + 1 =", "answer": "2"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: found no key"):
        PromptStream(config, tokenizer)
    skips = config_of(tmp_path, [row, {"prompt": "1 + 1 =", "answer": "2"}], data=SKIP)
    assert len(PromptStream(skips, tokenizer).prompts) == 1
    assert len(SFTExamples(config, tokenizer)) == 2


SKIP = {"on_bad_row": "skip"}
BAD: dict[str, tuple[Any, str]] = {
    "a number": ({"prompt": "1", "answer": "1", "completion": 3}, "completion = 3"),
    "a list": ({"prompt": "1", "completion": ["3"]}, r"completion = \['3'\]"),
    "blank": ({"prompt": "1", "completion": "  "}, "completion = '  '"),
    "nothing": ({"prompt": "1"}, "no key 'answer'"),
    "no messages": ({"messages": []}, r"messages = \[\]"),
    "text": ({"messages": "hi"}, "messages = 'hi'"),
    "no role": ({"messages": [{"content": "1"}]}, r"messages\[0\]"),
    "another role": ({"messages": [{"role": "human", "content": "1"}]}, r"messages\[0\]"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"messages\[0\]"),
    "a tool call": (
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": None}]},
        r"messages\[1\]",
    ),
    "an empty turn": (chat("1", " "), r"messages\[1\]"),
    "no assistant": (chat("1"), "messages by user alone"),
    "no user": (
        {"messages": [{"role": "assistant", "content": "1"}]},
        "messages in which the assistant answers no user",
    ),
    "too long": (chat("1", "It is " * 200), r"an example of \d+ tokens, expected at most 99"),
    "too long a completion": (
        {"prompt": "1", "completion": "It is " * 200},
        "an example of .*at most 99",
    ),
    "too long a prompt": (
        {"prompt": "1 + " * 200, "answer": "3"},
        "a prompt of .*rollout.max_prompt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_skipped(case: str, template: Any, tmp_path: Path) -> None:
    row, said = BAD[case]
    tokenizer = template(CHATML)
    rows = [{"prompt": "1 + 1 =", "answer": "2"}, row, chat("1 + 1 =", "2")]
    sft = {"max_tokens": 99}
    with pytest.raises(DataError, match=rf"rows.jsonl:2: found {said}"):
        SFTExamples(config_of(tmp_path, rows, sft=sft), tokenizer)
    examples = SFTExamples(config_of(tmp_path, rows, sft=sft, data=SKIP), tokenizer)
    assert len(examples) == 2 and "1 bad rows skipped" in examples.summary


def test_the_limit_is_what_a_microbatch_takes_and_the_model_has(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "1", "answer": "1 + " * 40}]
    context = {"parallel": {"context": 2}, "train": {"max_tokens_per_microbatch": 10}}
    with pytest.raises(DataError, match=r"at most 20 \(train.max_tokens_per_microbatch x"):
        SFTExamples(config_of(tmp_path, rows, **context), tokenizer)
    with pytest.raises(DataError, match=r"at most 30 \(max_position_embeddings"):
        SFTExamples(config_of(tmp_path, rows), tokenizer, max_context=30)
    unlimited = {"train": {"max_tokens_per_microbatch": 10, "microbatch_size": 1}}
    assert len(SFTExamples(config_of(tmp_path, rows, **unlimited), tokenizer)) == 1


# ---- conversations ------------------------------------------------------------------------------

TALKS = {
    "one turn": chat("What is 1 + 2?", "It is 3."),
    "a system message": chat("What is 1 + 2?", "It is 3.", system="Be short."),
    "three turns": chat("1 + 2?", "3", "And - 3?", "It is 0.", "And 1?", "ÄÖ 1\n\n2"),
    "the same words again": chat("3", "3", "3", "3"),
    "special tokens inside": chat("1?", "It is <answer>3</answer>"),
    "white space around": chat("1?", "It is 3. "),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("form", TEMPLATES)
def test_the_assistants_turns_are_learned(
    form: str, talk: str, template: Any, tmp_path: Path
) -> None:
    """These and the token that ends each, nothing else; that token ends a generation."""
    tokenizer, row = template(TEMPLATES[form]), TALKS[talk]
    end = tokenizer.convert_tokens_to_ids(ENDS)
    examples = SFTExamples(config_of(tmp_path, [row]), tokenizer, stop_ids=[end])
    example = only(examples)
    turns = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    found = learned(tokenizer, example)
    assert all(text.endswith(ENDS) for text in found)
    texts = [text.removesuffix(ENDS) for text in found]
    assert [t.strip() for t in texts] == [t.strip() for t in turns]
    assert example.learned[0] and example.learned[-1] and example.response_ids[-1] == end
    # What is learned stands behind what the template writes: the whole is its rendering.
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    written = tokenizer.decode([*example.prompt_ids, *example.response_ids])
    assert written == whole.removesuffix("\n")


def test_what_follows_the_last_answer_is_left_out(template: Any, tmp_path: Path) -> None:
    tokenizer = template(CHATML)
    rows = [chat("1 + 2?", "3", "Thanks"), chat("1 + 2?", "3")]
    first, second = (only(SFTExamples(config_of(tmp_path, [row]), tokenizer)) for row in rows)
    assert first == second


@pytest.mark.parametrize("form", ["prefixes", "marks with the end"])
def test_a_turn_that_ends_no_generation_is_followed_by_eos(
    form: str, template: Any, tmp_path: Path
) -> None:
    """Qwen2.5's base models: `<|im_end|>` ends a turn, the tokenizer's EOS a generation."""
    tokenizer = template(TEMPLATES[form])
    example = only(SFTExamples(config_of(tmp_path, [chat("1?", "3", "2?", "4")]), tokenizer))
    eos = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    assert learned(tokenizer, example) == [f"3{ENDS}", f"4{ENDS}{eos}"]
    plain = template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    example = only(SFTExamples(config_of(tmp_path, [chat("1?", "3", "2?", "4")]), plain))
    assert learned(tokenizer, example) == ["3", f"4{eos}"]


REFUSED = {
    "earlier thoughts go": (
        CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}"),
        "in another way once the conversation goes on",
    ),
    "another text": (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "as it is"),
    "one turn is not marked": (
        "{% for m in messages %}{{ m.role }}{% if loop.last %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        "1 marked turns of an assistant that has 2",
    ),
    "the role is marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.role }}:"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}",
        "as the assistant's tokens, whose turn is",
    ),
    "it raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "it is broken": ("{% for m in messages %}{{ m.role.nothing.there }}{% endfor %}", "refuses"),
    "nothing comes before": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
        "writes nothing before the assistant",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_learned_from(case: str, template: Any, tmp_path: Path) -> None:
    text, said = REFUSED[case]
    tokenizer = template(text)
    rows = [chat("One?", "It is 3.", "Two?", "It is 0.")]
    with pytest.raises(DataError, match=said) as refused:
        SFTExamples(config_of(tmp_path, rows), tokenizer)
    assert str(refused.value).startswith(f"{tmp_path}/rows.jsonl:1: found ")
    more = [*rows, {"prompt": "1", "answer": "2"}]
    assert len(SFTExamples(config_of(tmp_path, more, data=SKIP), tokenizer)) == 1


def test_messages_without_a_template(template: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        SFTExamples(config_of(tmp_path, [chat("1?", "3")]), template(None))


# ---- held out, epochs, the cursor ---------------------------------------------------------------


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"1 + {i} =", "answer": str(1 + i)} for i in range(count)]


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
