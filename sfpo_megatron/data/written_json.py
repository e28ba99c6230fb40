"""JSON of a user's files: numbers keep the value that is written, and no key stands twice."""

from __future__ import annotations

import json
from typing import Any

from sfpo_megatron.config.fields import first_repeated
from sfpo_megatron.data.values import written_float


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"two keys named {first_repeated(name for name, _ in pairs)!r}")
    return found


_DECODER = json.JSONDecoder(parse_float=written_float, object_pairs_hook=_object)


def read_written(text: str) -> Any:
    """The value of a JSON text; ValueError or RecursionError for what is none."""
    return _DECODER.decode(text)
