"""A JSON object in a file of a model directory, or what is there in its place. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from sfpo_megatron.families.hf_config import HFConfig
from sfpo_megatron.families.safetensors_header import (
    ModelFilesError,
    impostor,
    opened,
    what_is_there,
)

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def read_object(file: Path, *, expected: str = "a JSON object", fix: str) -> HFConfig:
    """The object in `file`; ModelFilesError says what is there in its place, and `fix`."""
    try:
        with opened(file) as stream:
            data = stream.read()
    except OSError as error:
        found = what_is_there(file, error)
        raise ModelFilesError(f"{found} at {file}", expected, fix) from error
    if not data.lstrip().startswith(b"{") and (other := impostor(data)):
        raise ModelFilesError(f"{other[0]} at {file}", expected, other[1])
    if data.startswith(_MARKS):  # transformers and vLLM refuse it too
        fix = "save it as UTF-8 without one"
        raise ModelFilesError(f"a byte-order mark (BOM) in {file}", "plain UTF-8", fix)
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{file}: {error}", "valid JSON", fix) from error
    if not isinstance(found, dict):
        what = f"{file}: found a {type(found).__name__}, not an object"
        raise ModelFilesError(what, expected, fix)
    return found
