"""The two words that all readers of a config.json share. No torch."""

from __future__ import annotations

from typing import Any, TypeAlias

HFConfig: TypeAlias = dict[str, Any]
"""A Hugging Face config.json."""
Finding: TypeAlias = tuple[str, ...]
"""What a config.json asks for, what was expected, and perhaps what to do."""
