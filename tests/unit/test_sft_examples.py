"""What a warm start learns from: completions, conversations, masks, lengths, held-out rows, epochs.

Tokenizers are real ones of transformers, trained on the spot, with templates in the forms that
models ship. Not exercised: pretrained tokenizers, the loss (tests/dist/test_warm_start.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made.conversations import CHATML, ENDS, TEMPLATES, chat, config_of

from sfpo_megatron.data import DataError, PromptStream, SFTExample, SFTExamples


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
    "a null answer": ({"completion": "It is 3.", "answer": None, "messages": None}, "It is 3."),
    "a message": ({"completion": [{"role": "assistant", "content": "It is 3."}]}, "It is 3."),
    "a message in parts": (
        {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "It is 3."}]}]},
        "It is 3.",
    ),
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
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
BESIDE = {
    "tool_calls": [CALL],
    "function_call": {"name": "add", "arguments": "{}"},
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "One and two."),
}


def said_too(content: str | None, **more: Any) -> dict[str, Any]:
    """A row whose assistant says more than its content."""
    row = chat("1 + 2 =", "")
    row["messages"][1] |= {"content": content, **more}
    return row


BAD: dict[str, tuple[Any, str]] = {
    "a number": ({"prompt": "1", "answer": "1", "completion": 3}, "completion = 3"),
    "a list": ({"prompt": "1", "completion": ["3"]}, r"completion = \['3'\]"),
    "blank": ({"prompt": "1", "completion": "  "}, "completion = '  '"),
    "half a pair": (
        {"prompt": "1", "answer": "1", "completion": "It is \ud83d."},
        "a completion that JSON cannot hold",
    ),
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
    "half a pair in a turn": (chat("1", "2 \ud83d"), r"half of a surrogate pair in messages\[1\]"),
    "half a pair in a question": (chat("\ud83d", "2"), r"half of .* in messages\[0\]"),
    "an empty turn": (chat("1", " "), r"messages\[1\]"),
    **{
        f"{key} beside content": (
            said_too("Let me compute.", **{key: value}),
            rf"messages\[1\] with {key}, .*; write {key} into content",
        )
        for key, value in BESIDE.items()
    },
    "a call alone": (
        said_too("", tool_calls=[CALL]),
        r"messages\[1\] with tool_calls, .*; write tool_calls into content",
    ),
    "a call and null": (said_too(None, tool_calls=[CALL]), r"messages\[1\] with tool_calls"),
    "a completion's thought": (
        {"prompt": "1", "completion": [{"role": "assistant", "content": "2", "thinking": "Hm."}]},
        "a completion with thinking, .*; write thinking into content",
    ),
    "a turn of no weight": (
        said_too("2", weight=0),
        r"messages\[1\] has weight 0, .*; cut the conversation there",
    ),
    **{
        f"{key} of {kind}": ({**row, key: item}, f"{key} = .*, which is not read")
        for key, item in (("tools", [CALL]), ("chat_template_kwargs", {"enable_thinking": False}))
        for kind, row in (
            ("messages", chat("1", "2")),
            ("a completion", {"prompt": "1", "completion": "2"}),
        )
    },
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


THOUGHTFUL = CHATML.replace(
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last and "
    "'</think>' not in m.content }}{{ m.content }}",
)
"""Qwen3's: the last turn gets an empty thought if it has none, the generation prompt does not."""


@pytest.mark.parametrize(
    "content", ["n", "think", "<", "\nn", " k ", "THE-TURN", "<think>\nOne.\n</think>\n\nn"]
)
def test_a_text_that_is_in_what_the_template_writes_before_it(
    content: str, template: Any, tmp_path: Path
) -> None:
    for text in (THOUGHTFUL, THOUGHTFUL.replace("{{ m.content }}", "{{ m.content | trim }}")):
        tokenizer = template(text)
        end = tokenizer.convert_tokens_to_ids(ENDS)
        row = chat("Which letter?", content)
        example = only(SFTExamples(config_of(tmp_path, [row]), tokenizer, stop_ids=[end]))
        (found,) = learned(tokenizer, example)
        assert found.removesuffix(ENDS).strip() == content.strip() and found.endswith(ENDS)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        written = tokenizer.decode([*example.prompt_ids, *example.response_ids])
        assert written == whole.removesuffix("\n")
        thought = "" if "</think>" in content else "<think>\n\n</think>\n\n"
        assert tokenizer.decode(example.prompt_ids).endswith(f"assistant\n{thought}")


ALWAYS_THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and '</think>' not in m.content }}"
    "{{ m.content }}",
)
"""Qwen3's that always thinks: its generation prompt opens the thought."""


@pytest.mark.parametrize("opener", ["<think>\n", "\n<think>\n", ""])
def test_a_thought_that_the_prompt_opens_is_opened_once(
    opener: str, template: Any, tmp_path: Path
) -> None:
    """A completion may have the opener or not; a message has it."""
    tokenizer = template(ALWAYS_THINKS)
    end = tokenizer.convert_tokens_to_ids(ENDS)
    thought = "Hm.\n</think>\n\n42"
    row = {"prompt": "6 * 7 =", "completion": f"{opener}{thought}"}
    config = config_of(tmp_path, [row], data={"chat_template": True})
    one_turn = only(SFTExamples(config, tokenizer))
    assert tokenizer.decode(one_turn.prompt_ids).endswith("assistant\n<think>\n")
    assert tokenizer.decode(one_turn.response_ids[:-1]) == thought
    row = chat("6 * 7 =", f"<think>\n{thought}")
    turns = only(SFTExamples(config_of(tmp_path, [row]), tokenizer, stop_ids=[end]))
    assert turns.prompt_ids == one_turn.prompt_ids
    assert turns.response_ids == (*one_turn.response_ids[:-1], end)


def test_a_tag_that_a_plain_prompt_ends_with_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "1 in <answer>", "completion": "<answer>1</answer>"}]
    example = only(SFTExamples(config_of(tmp_path, rows), tokenizer))
    assert tokenizer.decode(example.response_ids[:-1]) == "<answer>1</answer>"


def test_what_says_nothing_beside_the_content_is_nothing(template: Any, tmp_path: Path) -> None:
    """Columns of structs are filled up with nulls."""
    nothing = {"tool_calls": [{"function": {"name": None}}], "function_call": {"name": None}}
    rows = [
        said_too("3", **dict.fromkeys(BESIDE)),
        said_too("4", **nothing, reasoning_content="", reasoning=" \n", thinking=float("nan")),
        said_too("5", tool_calls=[], function_call={}, weight=1.0),
        {**said_too("6", weight=None), "tools": [], "chat_template_kwargs": {}},
        {**said_too("7"), "tools": None, "chat_template_kwargs": {"enable_thinking": None}},
    ]
    tokenizer = template(CHATML)
    examples = SFTExamples(config_of(tmp_path, rows), tokenizer)
    found = [learned(tokenizer, example)[0] for example in examples.next_batch(5)]
    assert {text[0] for text in found} == {"3", "4", "5", "6", "7"}


def test_a_turn_in_parts_of_text_is_their_text(template: Any, tmp_path: Path) -> None:
    """A message of `prompt` may be such a list too; an image in it is no text."""
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "0."}]
    rows = [chat("What is 1 - 1?", "x") for _ in range(2)]
    rows[0]["messages"][1]["content"] = parts
    rows[1]["messages"][1]["content"] = [*parts, {"type": "image"}]
    config = config_of(tmp_path, rows, data=SKIP)
    examples = SFTExamples(config, template(CHATML), stop_ids=())
    assert len(examples) == 1
    assert learned(template(CHATML), only(examples))[0].startswith("It is 0.<|im_end|>")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        *[({}, "3"), ({"completion": None}, "3"), ({"completion": "It is 3."}, "It is 3.")],
        *[({"answer": None}, "3"), ({"answer": " ", "prompt": None}, "3")],
    ],
)
def test_messages_beside_a_prompt(
    more: dict[str, Any], text: str, template: Any, tmp_path: Path
) -> None:
    """Rows of ultrachat_200k: learned from where no completion is there."""
    tokenizer = template(CHATML)
    row = {"prompt": "1 + 2?", **chat("1 + 2?", "3"), **more}
    config = config_of(tmp_path, [row], data={"chat_template": True})
    (found,) = learned(tokenizer, only(SFTExamples(config, tokenizer)))
    eos = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    assert found.removesuffix(eos).removesuffix(ENDS) == text


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
    assert ("let {% generation %} in" in str(refused.value)) == ("{% generation" in text)
    more = [*rows, {"prompt": "1", "answer": "2"}]
    assert len(SFTExamples(config_of(tmp_path, more, data=SKIP), tokenizer)) == 1


def test_messages_without_a_template(template: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        SFTExamples(config_of(tmp_path, [chat("1?", "3")]), template(None))
