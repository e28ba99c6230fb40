"""Prompts: determinism, the resumable cursor, held-out questions, mixing, templates.

The tokenizer is a real transformers one, trained on the spot. Not exercised: pretrained
tokenizers (tests/e2e does, with SmolLM2).
"""

from __future__ import annotations

import json

import pytest
from made.prompts import make_config, sums

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import DataError, PromptStream, SFTExamples, eval_prompts


def test_same_seed_same_prompts_other_seed_other_prompts(tokenizer):
    def questions(seed):
        stream = PromptStream(make_config([sums(100)], seed=seed), tokenizer)
        return [p.question for p in stream.next_batch(100)]

    assert questions(0) == questions(0)
    # Seeds 0 and 1 must not give shifted copies (reasoning-gym seeds problem i with seed + i).
    assert len(set(questions(0)) & set(questions(1))) < 10


def test_epoch_is_a_permutation_and_the_next_one_is_shuffled_anew(tokenizer):
    stream = PromptStream(make_config([sums(60)]), tokenizer)
    epochs = [[p.id for _ in range(6) for p in stream.next_batch(10)] for _ in range(3)]
    for ids in epochs:
        assert sorted(ids) == sorted(f"chain_sum/{i}" for i in range(60))
    assert epochs[0] != epochs[1] != epochs[2]


def test_no_batch_holds_a_prompt_twice_when_epochs_do_not_divide(tokenizer):
    stream = PromptStream(make_config([sums(25)]), tokenizer)
    for _ in range(20):
        ids = [p.id for p in stream.next_batch(10)]
        assert len(set(ids)) == 10


@pytest.mark.parametrize("num_batches_before", [0, 1, 4, 9])
def test_resumed_cursor_draws_what_the_ended_run_would_have(tokenizer, num_batches_before):
    config = make_config([sums(50)])
    stream = PromptStream(config, tokenizer)
    for _ in range(num_batches_before):
        stream.next_batch(16)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_batch(16) for _ in range(8)]
    resumed = PromptStream(config, tokenizer)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(16) for _ in range(8)] == expected


def test_cursor_of_other_data_is_refused(tokenizer):
    state = PromptStream(make_config([sums(50)]), tokenizer).state_dict()
    for other in (make_config([sums(51)]), make_config([sums(50)], seed=1)):
        with pytest.raises(DataError, match="data cursor: found"):
            PromptStream(other, tokenizer).load_state_dict(state)


def test_eval_is_the_same_for_every_seed_and_never_trained_on(tokenizer):
    one_digit = {"min_digits": 1, "max_digits": 1}  # 200 problems exist: train is sure to hit some
    configs = [
        make_config([sums(400, **one_digit)], [sums(60, **one_digit)], seed=s) for s in (0, 1)
    ]
    held_out = [eval_prompts(config, tokenizer) for config in configs]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 60
    for config in configs:
        stream = PromptStream(config, tokenizer)
        trained = {p.question for p in stream.prompts}
        assert trained and not trained & {p.question for p in held_out[0]}
        assert len(stream.prompts) < 400
        assert f"{400 - len(stream.prompts)} left out" in stream.summary


def test_all_train_questions_held_out_is_an_error(tokenizer):
    digits = {"min_digits": 1, "max_digits": 1}
    config = make_config([sums(30, **digits)], [sums(8000, **digits)])
    with pytest.raises(DataError, match=r"data.train: found 30 prompts, every one a question"):
        PromptStream(config, tokenizer)


def test_sources_are_mixed_and_ids_stay_unique(tokenizer, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"What is {i}?", "answer": i, "level": 3} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    mine = DataSource(source="jsonl", path=str(file))
    stream = PromptStream(make_config([mine, sums(40), mine]), tokenizer)
    batch = stream.next_batch(60)
    assert len({p.id for p in stream.prompts}) == 120
    assert {p.id.partition("/")[0] for p in batch} == {"mine", "chain_sum", "mine#2"}
    prompt = next(p for p in stream.prompts if p.id == "mine/8")
    assert (prompt.answer, prompt.metadata) == ("7", {"level": 3})


def test_more_prompts_a_step_than_there_are(tokenizer):
    with pytest.raises(DataError, match="found 5 prompts, expected at least one batch of 8"):
        PromptStream(make_config([sums(5)]), tokenizer).next_batch(8)


def test_suffix_and_chat_template(tokenizer):
    plain = PromptStream(make_config([sums(3)], prompt_suffix=" Go."), tokenizer).prompts[0]
    assert plain.text == plain.question + " Go."
    assert tokenizer.decode(plain.token_ids) == plain.text
    with pytest.raises(DataError, match=r"data.chat_template: found true"):
        PromptStream(make_config([sums(3)], chat_template=True), tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    try:
        config = make_config([sums(3)], chat_template=True, prompt_suffix=" Go.")
        prompt = PromptStream(config, tokenizer).prompts[0]
    finally:
        tokenizer.chat_template = None
    assert prompt.text == f"[user] {prompt.question} Go.[bot]"
    assert tokenizer.decode(prompt.token_ids) == prompt.text


@pytest.mark.parametrize("templated", [False, True])
def test_a_prompt_begins_with_one_bos(tokenizer, templated):
    """The tokenizer's own, or the one that a chat template writes; never both."""

    class WithBOS:
        """The fixture's tokenizer, with a beginning of its own: token -1."""

        chat_template = "there is one"

        def __call__(self, texts, add_special_tokens):
            bare = [text.removeprefix("<s>") for text in texts]
            ids = tokenizer(bare, add_special_tokens=False)["input_ids"]
            begins = [[-1] * (add_special_tokens + text.startswith("<s>")) for text in texts]
            return {"input_ids": [begin + rest for begin, rest in zip(begins, ids, strict=True)]}

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            assert add_generation_prompt and not tokenize
            return "<s>" + messages[-1]["content"]

    config = make_config([sums(3)], chat_template=templated)
    for prompt in PromptStream(config, WithBOS()).prompts:
        assert prompt.token_ids[0] == -1 and -1 not in prompt.token_ids[1:]
        assert tokenizer.decode(prompt.token_ids[1:]) == prompt.question


def test_white_space_makes_no_other_question(tokenizer, tmp_path):
    """A question of data.eval is not trained on, however it is set."""
    for name, questions in (
        ("train", ["What is\n 1  + 1?", "What is 1+1?", "  What is 2 + 2? "]),
        ("exam", ["What is 1 + 1?", "What  is 2 +\t2?"]),
    ):
        rows = [json.dumps({"prompt": question, "answer": "2"}) for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    train, exam = (
        DataSource(source="jsonl", path=str(tmp_path / f"{name}.jsonl"))
        for name in ("train", "exam")
    )
    stream = PromptStream(make_config([train], [exam]), tokenizer)
    assert [prompt.question for prompt in stream.prompts] == ["What is 1+1?"]


def test_sft_examples_end_with_eos_and_hold_eval_out(tokenizer):
    config = make_config([sums(50)], [sums(20)])
    examples = SFTExamples(config, tokenizer)
    again = SFTExamples(config, tokenizer)
    by_prompt = {p.token_ids: p for p in PromptStream(config, tokenizer).prompts}
    seen = set()
    for _ in range(120):  # past the first epoch
        (example,) = examples.next_batch(1)
        assert [example] == again.next_batch(1)
        assert example.response_ids[-1] == tokenizer.eos_token_id and all(example.learned)
        answer = by_prompt[example.prompt_ids].answer
        assert tokenizer.decode(example.response_ids[:-1]) == answer
        seen.add(example.prompt_ids)
    assert seen == set(by_prompt)
