"""A tokenizer and a model that do not fit are named by `check`, which reads JSON only.

Not exercised: an embedding with other rows than vocab_size (the weight files' own tests).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config, write_run

from sfpo_megatron import cli
from sfpo_megatron.config.rules.model import Problem, read_model
from sfpo_megatron.config.rules.tokenizer import tokenizer_fits
from sfpo_megatron.families.shape import ModelShape

WORDS = [f"w{number}" for number in range(98)]
NUM_ROWS = 101
"""vocab_size of `model_dir`: three more than there are words."""


def tokenizer_json(
    kind: str = "BPE", num_words: int = 98, added: tuple[int, ...] = ()
) -> dict[str, Any]:
    """What tokenizers writes, as far as ids are concerned."""
    vocab: Any = {word: number for number, word in enumerate(WORDS)}
    if kind == "Unigram":
        vocab = [[word, -1.0] for word in WORDS]
    more = [{"id": number, "content": f"<added {number}>", "special": True} for number in added]
    return {"model": {"type": kind, "vocab": vocab}, "added_tokens": more}


@pytest.fixture
def problems(model_dir: Callable[..., Path]) -> Callable[..., list[Problem]]:
    """`problems({file: content})` of a model with 101 rows and a tokenizer of these files."""

    def find(files: dict[str, Any], **changes: Any) -> list[Problem]:
        folder = model_dir(**changes)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
        config = run_config(model={"path": str(folder)})
        (shape,) = [item for item in read_model(config) if isinstance(item, ModelShape)]
        return list(tokenizer_fits(config, shape, True))

    return find


def decoder(*tokens: str) -> dict[str, Any]:
    return {str(90 + i): {"content": token, "special": True} for i, token in enumerate(tokens)}


FITTING: dict[str, dict[str, Any]] = {
    "fewer_tokens_than_rows": {"tokenizer.json": tokenizer_json()},
    "the_last_row": {"tokenizer.json": tokenizer_json(added=(98, 100))},
    "unigram": {"tokenizer.json": tokenizer_json("Unigram")},
    "three_more": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {"pad_token": "<p>", "additional_special_tokens": ["<a>", "<b>"]},
    },
    "known_ones": {
        "tokenizer.json": tokenizer_json(added=(98, 99, 100)),
        "tokenizer_config.json": {
            "eos_token": "w1",
            "pad_token": {"content": "<added 98>", "__type": "AddedToken"},
            "added_tokens_decoder": decoder("<added 99>"),
            "extra_special_tokens": {"x": "w2"},
        },
        "added_tokens.json": {"<added 100>": 100},
        "special_tokens_map.json": {"pad_token": "w3"},
    },
    "ids": {
        "tokenizer.json": tokenizer_json(),
        "generation_config.json": {"eos_token_id": [0, 100], "pad_token_id": None},
    },
}


@pytest.mark.parametrize("name", FITTING)
def test_what_fits(problems: Callable[..., list[Problem]], name: str) -> None:
    assert problems(FITTING[name], bos_token_id=0, eos_token_id=[1, 2]) == []


PAST: dict[str, tuple[dict[str, Any], str]] = {
    "one_word_too_many": (
        {"tokenizer.json": {"model": {"vocab": {f"w{i}": i for i in range(102)}}}},
        "token 'w101' with id 101 (1 such in all)",
    ),
    "sparse_ids": (
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "far": 4000, "farther": 4001}}}},
        "token 'farther' with id 4001 (2 such in all)",
    ),
    "unigram": (
        {"tokenizer.json": {"model": {"vocab": [[f"w{i}", 0.0] for i in range(102)]}}},
        "token 'w101' with id 101 (1 such in all)",
    ),
    "added": (
        {"tokenizer.json": tokenizer_json(added=(98, 101, 102))},
        "token '<added 102>' with id 102 (2 such in all)",
    ),
    "declared": (
        {
            "tokenizer.json": tokenizer_json(added=(98, 99)),
            "tokenizer_config.json": {"eos_token": "w1", "pad_token": "[PAD]", "mask_token": "<m>"},
        },
        "token '<m>', which tokenizer.json does not have and which therefore gets id 101 (1 such",
    ),
    "added_tokens_decoder": (
        {
            "tokenizer.json": tokenizer_json(),
            "tokenizer_config.json": {"added_tokens_decoder": decoder(*"abcd")},
        },
        "token 'd', which tokenizer.json does not have and which therefore gets id 101 (1 such",
    ),
    "added_tokens_json": (
        {
            "tokenizer.json": tokenizer_json(),
            "added_tokens.json": {t: 98 + i for i, t in enumerate("abcde")},
        },
        "id 101 (2 such",
    ),
    "special_tokens_map": (
        {
            "tokenizer.json": tokenizer_json(added=(98, 99, 100)),
            "special_tokens_map.json": {"pad_token": {"content": "<p>"}},
        },
        "token '<p>', which tokenizer.json does not have and which therefore gets id 101",
    ),
}


@pytest.mark.parametrize("name", PAST)
def test_tokens_without_a_row_are_named(problems: Callable[..., list[Problem]], name: str) -> None:
    files, expected = PAST[name]
    (problem,) = problems(files)
    assert (problem.key, problem.level) == ("model.path", "error")
    assert expected in problem.found and "vocab_size (101)" in problem.expected


NOT_READ = ("unigram", "sparse_ids")
CLOSED_UP = ("the_last_row", "added")
"""tokenizers gives their tokens other ids than the file says; what it says is what is checked."""


@pytest.mark.parametrize("name", sorted({*FITTING, *PAST} - {*NOT_READ, *CLOSED_UP}))
def test_transformers_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    """It loads what fits and what does not; its highest id says which it was."""
    from transformers import PreTrainedTokenizerFast

    files = FITTING.get(name) or PAST[name][0]
    whole = files["tokenizer.json"]
    model = {"type": "WordLevel", "unk_token": "w0", **whole["model"]} | {"type": "WordLevel"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"special": True} | item | flags for item in whole.get("added_tokens", [])]
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    text = {"version": "1.0", "added_tokens": added, "model": model, "post_processor": None} | rest
    for file, content in (files | {"tokenizer.json": text}).items():
        (tmp_path / file).write_text(json.dumps(content))
    vocabulary = PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab()
    assert (max(vocabulary.values()) < NUM_ROWS) == (name in FITTING)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value", "level"),
    [
        ("eos_token_id", 101, "error"),
        ("eos_token_id", [1, 4000], "error"),
        ("bos_token_id", -1, "error"),
        ("pad_token_id", 101, "error"),
        ("pad_token_id", -1, "warning"),
    ],
)
def test_ids_of_special_tokens_that_no_token_has(
    problems: Callable[..., list[Problem]], file: str, key: str, value: Any, level: str
) -> None:
    changes = {key: value} if file == "config.json" else {}
    files = {} if changes else {file: {key: value}}
    (problem,) = problems({"tokenizer.json": tokenizer_json(), **files}, **changes)
    wrong = value[1] if isinstance(value, list) else value
    assert problem.level == level
    assert f"{key} {wrong} in" in problem.found and problem.found.endswith(file)


BROKEN = {
    "no_json": {"tokenizer.json": "{"},
    "a_list": {"tokenizer.json": []},
    "a_list_beside": {"tokenizer_config.json": ["a"]},
    "text_ids": {"tokenizer.json": {"model": {"vocab": {"a": "0"}}}},
    "no_ids": {"tokenizer.json": tokenizer_json() | {"added_tokens": ["<a>"]}},
    "an_empty_object": {"tokenizer.json": {}},
    "no_words": {"tokenizer.json": {"model": {"type": "BPE", "vocab": {}}}},
    "generation": {"generation_config.json": "version https://git-lfs.github.com/spec/v1"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read_are_named(
    problems: Callable[..., list[Problem]], name: str
) -> None:
    files = {"tokenizer.json": tokenizer_json(), **BROKEN[name]}
    (problem,) = problems(files)
    assert problem.level == "error" and next(iter(BROKEN[name])) in problem.found


def test_the_command_line_names_it(
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (model_dir() / "tokenizer.json").write_text(json.dumps(tokenizer_json(added=(101,))))
    write_run()
    assert cli.main(["check", "run.yaml"]) == 2
    assert "token '<added 101>' with id 101" in capsys.readouterr().err
