"""Tokenizer and model: has every token a row in the embedding? Read as JSON, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeGuard

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.rules.model_files import problem_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.json_file import read_object
from sfpo_megatron.families.safetensors_header import ModelFilesError
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.types import Json

_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
_FIX = "download the model's tokenizer again"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_fits(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """Tokens without a row, and ids of special tokens that no token has."""
    path = Path(config.model.path)
    try:
        yield from _tokens(path, shape.vocab_size)
        for name in ("config.json", "generation_config.json"):
            yield from _special_ids(path / name, shape.vocab_size)
    except ModelFilesError as error:
        yield problem_of(error)


def _tokens(path: Path, num_rows: int) -> Iterator[Problem]:
    own, added = _vocabulary(path / "tokenizer.json")
    listed = {**own, **added}
    if not listed:
        return
    token, highest = max(listed.items(), key=lambda item: item[1])
    following = len(listed)  # the next id, which tokenizers gives to a token that it does not know
    new = list(dict.fromkeys(t for t in _declared(path) if t not in listed))
    if highest >= num_rows:
        more = sum(value >= num_rows for value in listed.values())
        yield _too_high(path / "tokenizer.json", token, highest, num_rows, more)
    elif new and following + len(new) > num_rows:
        first = max(num_rows - following, 0)
        yield _too_high(
            path / "tokenizer_config.json",
            new[first],
            following + first,
            num_rows,
            len(new) - first,
            ", which tokenizer.json does not have and which therefore gets",
        )


def _too_high(
    file: Path, token: str, value: int, num_rows: int, count: int, why: str = " with"
) -> Problem:
    return Problem(
        "model.path",
        f"token {token!r}{why} id {value} ({count} such in all) in {file}",
        f"ids below the model's vocab_size ({num_rows})",
        "take the tokenizer of this model, or resize its embedding and vocab_size",
    )


def _read(file: Path) -> Mapping[str, Json]:
    """The object in `file`; empty where there is no such file."""
    return read_object(file, fix=_FIX) if file.is_file() else {}


def _vocabulary(file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Token -> id of a tokenizer.json: of its model, and of the tokens that were added to it."""
    whole = _read(file)
    model, more = whole.get("model") or {}, whole.get("added_tokens") or []
    vocab = model.get("vocab") or {} if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: a token's place is its id
        tokens = (item[0] if isinstance(item, list) and item else item for item in vocab)
        vocab = {str(token): place for place, token in enumerate(tokens)}
    own = {k: v for k, v in vocab.items() if _is_id(v)} if isinstance(vocab, dict) else {}
    if not isinstance(vocab, dict) or len(own) < len(vocab) or (file.is_file() and not own):
        found = f"no vocabulary under model.vocab of {file}"
        raise ModelFilesError(found, "tokens with their ids", _FIX)
    added: dict[str, int] = {}
    for item in more if isinstance(more, list) else [None]:
        token = item if isinstance(item, dict) else {}
        if not _is_id(value := token.get("id")):
            found = f"{item!r} under added_tokens of {file}"
            raise ModelFilesError(found, "objects with content and id", _FIX)
        added[str(token.get("content"))] = value
    return own, added


def _is_id(value: Json) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _declared(path: Path) -> Iterator[str]:
    """Tokens that the other files name, in the order in which they are added."""
    settings = _read(path / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    yield from _texts(decoder.values() if isinstance(decoder, dict) else ())
    yield from _read(path / "added_tokens.json")
    for source in (settings, _read(path / "special_tokens_map.json")):
        for name in _SPECIAL:
            value = source.get(name)
            if isinstance(value, dict) and "content" not in value:
                value = list(value.values())
            yield from _texts(value if isinstance(value, list) else [value])


def _texts(values: Iterable[Json]) -> Iterator[str]:
    for value in values:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield text


def _special_ids(file: Path, num_rows: int) -> Iterator[Problem]:
    settings = _read(file)
    for name in _IDS:
        given = settings.get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is None or (_is_id(value) and value < num_rows):
                continue
            # Old Llamas have pad_token_id -1, which means none; nobody pads here.
            none = name == "pad_token_id" and value == -1
            level: Literal["warning", "error"] = "warning" if none else "error"
            yield Problem(
                "model.path",
                f"{name} {value!r} in {file}",
                f"an id below the model's vocab_size ({num_rows}), or null",
                "set it to the tokenizer's, or to null",
                level,
            )
