"""What stands in the last `<answer>...</answer>` of a response."""

from __future__ import annotations

_OPENING, _CLOSING = "<answer>", "</answer>"


def tagged(response: str) -> str | None:
    """The content of the last pair of tags, found in time linear in the response; None without."""
    end = response.rfind(_CLOSING)
    start = response.rfind(_OPENING, 0, end) if end >= 0 else -1
    return response[start + len(_OPENING) : end].strip() if start >= 0 else None
