"""The text and the tokens of a prompt: templates, what they refuse or drop, the date, BOS and EOS.

The tokenizers are real ones of transformers, trained on the spot, with special tokens added.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made.prompts import make_config

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.tree import DataConfig, DataSource, RewardConfig
from sfpo_megatron.data import DataError, PromptStream, SFTExamples, eval_prompts
from sfpo_megatron.data.tokenize import Tokens, response_text
from sfpo_megatron.demo.tiny_model import train_tokenizer

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% endfor %}[bot]"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
DATED = "{{ strftime_now('%d %b %Y') }}" + TURNS
GOOD: dict[str, Any] = {"prompt": "2 + 2 =", "answer": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def tokenizer() -> Any:
    """One of each test's own: it is changed."""
    return train_tokenizer(["State the final answer: 1 + 2 - 3 = [user] [bot]"] * 4, 383)


def source(tmp_path: Path, *rows: dict[str, Any]) -> DataSource:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(source="jsonl", path=str(file))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (NO_SYSTEM, "a chat template that raises TemplateError: 'System role not supported'"),
        ("{{ messages[0].content + 1 if messages[1] else messages[0].content }}", "raises TypeErr"),
        ("{{ messages[-1].content }}[bot]", "drops the system's message 'Be brief.'"),
        ("{{ messages[0].content }}[bot]", "drops the user's message '3 + 3 ='"),
    ],
)
def test_what_a_template_makes_nothing_of_is_a_bad_row(
    tmp_path: Path, tokenizer: Any, template: str, says: str
) -> None:
    tokenizer.chat_template = template
    rows = source(tmp_path, GOOD, {"prompt": [SYSTEM, user("3 + 3 =")], "answer": "6"})
    with pytest.raises(DataError) as caught:
        PromptStream(make_config([rows], chat_template=True), tokenizer)
    assert str(caught.value).startswith(f"{rows.path}:2: found ") and says in str(caught.value)
    stream = PromptStream(make_config([rows], chat_template=True, on_bad_row="skip"), tokenizer)
    assert [prompt.id for prompt in stream.prompts] == ["rows/1"]
    assert "1 that the chat template" in stream.summary


def test_white_space_and_spelling_are_not_dropping(tmp_path: Path, tokenizer: Any) -> None:
    rows = source(tmp_path, {"prompt": ' say\n"x"  and\ty ', "answer": "4"})
    for template in (TURNS, "{{ messages[0].content | tojson }}[bot]",
                     "{{ messages[0].content.split() | join(' ') }}[bot]"):  # fmt: skip
        tokenizer.chat_template = template
        assert len(PromptStream(make_config([rows], chat_template=True), tokenizer).prompts) == 1


def test_a_conversation_needs_a_template(tmp_path: Path, tokenizer: Any) -> None:
    turns = [SYSTEM, user("2 + 2 ="), {"role": "assistant", "content": "4"}, user("And doubled?")]
    rows = source(tmp_path, GOOD, {"prompt": turns, "answer": "8"})
    config = make_config([rows], chat_template=True, prompt_prefix="Q: ", prompt_suffix="!")
    tokenizer.chat_template = TURNS
    prompt = PromptStream(config, tokenizer).prompts[1]
    expected = "[system] Be brief.[user] 2 + 2 =[assistant] 4[user] Q: And doubled?![bot]"
    assert (prompt.text, prompt.question) == (expected, "And doubled?")
    assert tokenizer.decode(prompt.token_ids) == expected
    with pytest.raises(DataError, match=r":2: found a conversation of 3 turns, and no chat templ"):
        PromptStream(make_config([rows]), tokenizer)


def test_system_prompt_prefix_and_template_args(tmp_path: Path, tokenizer: Any) -> None:
    rows = source(tmp_path, GOOD, {"prompt": [SYSTEM, user("3 + 3 =")], "answer": "6"})
    more = {"system_prompt": "Add.", "prompt_prefix": "1 + 1 = 2\n"}
    first, second = PromptStream(make_config([rows], **more), tokenizer).prompts
    assert first.text == "Add.\n\n1 + 1 = 2\n2 + 2 ="
    assert second.text == "Be brief.\n\n1 + 1 = 2\n3 + 3 ="
    tokenizer.chat_template = TURNS + "{{ '<no>' if enable_thinking is false else '' }}"
    config = make_config([rows], chat_template=True, chat_template_args={"enable_thinking": False})
    assert PromptStream(config, tokenizer).prompts[0].text == "[user] 2 + 2 =[bot]<no>"
    for args, template in (({"tokenize": True}, True), ({"enable_thinking": False}, False)):
        with pytest.raises(FieldError, match=r"^chat_template_args: "):
            DataConfig(train=(rows,), chat_template=template, chat_template_args=args)


def test_the_date_stays_that_of_the_first_start(tmp_path: Path, tokenizer: Any) -> None:
    """The next day's resume gets the same prompts; without it they would be other ones."""
    tokenizer.chat_template = DATED
    config = make_config([source(tmp_path, GOOD)], chat_template=True)
    then = PromptStream(config, tokenizer, now="2026-01-31T23:59:00")
    assert then.prompts[0].text.startswith("31 Jan 2026[user]")
    assert "2026-01-31T23:59:00" in then.summary
    state = json.loads(json.dumps(then.state_dict()))
    again = PromptStream(config, tokenizer, now=state["now"])
    assert again.difference(state) == "" and again.prompts == then.prompts
    assert PromptStream(config, tokenizer).difference(state) != ""
    held_out = make_config([source(tmp_path, GOOD)], [source(tmp_path, GOOD)], chat_template=True)
    (prompt,) = eval_prompts(held_out, tokenizer, now=then.now)
    assert prompt.text == then.prompts[0].text
    tokenizer.chat_template = TURNS
    assert "now" not in PromptStream(config, tokenizer).state_dict()


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_a_prompt_begins_once_and_ends_where_generation_begins(
    tmp_path: Path, tokenizer: Any, repeats: int
) -> None:
    """A tokenizer that puts a token before every text and one behind it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bare = tokenizer("2 + 2 =", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <e>", special_tokens=[("<s>", bos), ("<e>", eos)]
    )
    rows = source(tmp_path, {"prompt": "<s>" * repeats + "2 + 2 =", "answer": "4"})
    stream = PromptStream(make_config([rows]), tokenizer)
    assert list(stream.prompts[0].token_ids) == [bos, *bare]
    assert "which the tokenizer appends, was taken off" in stream.summary
    assert ("1 prompts began with <s> already" in stream.summary) == bool(repeats)


def test_tokenized_like_the_tokenizers_own_call(tokenizer: Any) -> None:
    tokens = Tokens(make_config([DataSource(source="jsonl", path="x")]), tokenizer)
    texts = [f"{n} + <|endoftext|> \u00e9 {'= ' * (n % 7)}" for n in range(300)]
    assert list(tokens.of(texts)) == tokenizer(texts)["input_ids"]


def test_tags_that_are_special_tokens_survive(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    text = "2 + 2 = <answer>4</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "<answer>" not in tokenizer.decode(ids, skip_special_tokens=True)
    padded = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id or tokenizer.eos_token_id]
    assert response_text(tokenizer, padded, ()) == text
    assert response_text(tokenizer, ids, {ids[-1]}) == text.removesuffix("</answer>")


# ---- references and the report -----------------------------------------------------------------

UNREADABLE = {
    "last_number": ("none", "no number at all", "\\frac{x}{y}"),
    "math": ("$ $", "\\boxed{}", "$"),
    "multiple_choice": ("42", "both"),
    "tagged_answer": (),
}


@pytest.mark.parametrize("reward", UNREADABLE)
def test_a_reference_that_its_reward_cannot_read(
    tmp_path: Path, tokenizer: Any, reward: str
) -> None:
    rows = [{"prompt": f"p{n}", "answer": text} for n, text in enumerate(UNREADABLE[reward])]
    good = {"prompt": "q", "answer": "B" if reward == "multiple_choice" else "4"}
    config = make_config([source(tmp_path, good, *rows)], on_bad_row="skip")
    config = replace(config, reward=RewardConfig(function=reward))
    stream = PromptStream(config, tokenizer)
    assert [prompt.id for prompt in stream.prompts] == ["rows/1"]
    if rows:
        assert f"{len(rows)} with a reference that {reward} cannot read" in stream.summary


def test_a_choice_by_its_text_is_a_reference(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "Which?", "answer": "Paris", "choices": ["Rome", "Paris"]}
    config = make_config([source(tmp_path, row)])
    config = replace(config, reward=RewardConfig(function="multiple_choice"))
    assert len(PromptStream(config, tokenizer).prompts) == 1


def test_all_bad_rows_in_one_report(tmp_path: Path, tokenizer: Any) -> None:
    bad: list[dict[str, Any]] = [{"prompt": f"p{n}"} for n in range(23)]
    rows = source(tmp_path, GOOD, *bad, {"prompt": "2 + " * 99, "answer": "4"})
    with pytest.raises(DataError) as caught:
        PromptStream(make_config([rows]), tokenizer)
    *shown, last = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in shown] == [f"{rows.path}:{n}" for n in range(2, 22)]
    assert last.startswith("24 bad rows (23 without answer, 1 too long), the first 20 above: ")
    stream = PromptStream(make_config([rows], on_bad_row="skip"), tokenizer)
    assert "23 without answer, 1 too long" in stream.summary


def test_tasks_without_a_reference(tokenizer: Any) -> None:
    gym = DataSource(source="reasoning_gym", task="rush_hour", size=3)
    config = make_config([gym], max_prompt_tokens=4096)
    stream = PromptStream(config, tokenizer)
    assert [prompt.answer for prompt in stream.prompts] == [""] * 3
    assert "3 problems have no reference answer" in stream.summary
    with pytest.raises(DataError, match="a problem without a reference answer"):
        SFTExamples(config, tokenizer)
