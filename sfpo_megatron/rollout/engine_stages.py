"""What an engine that is starting is at, by what vLLM writes into its log."""

from __future__ import annotations

import re

_STAGES = (
    # What vLLM has written last of these, and what it does since.
    (r"Initializing a V1 LLM engine", "starting its workers"),
    (r"Starting to load model", "loading weights"),
    (r"Model loading took", "measuring memory"),
    (r"Compiling a graph|torch\.compile", "compiling"),
    (r"Capturing CUDA graph|Graph capturing", "capturing CUDA graphs"),
    (r"init engine \(profile", "making its first tokens"),
)
_BEFORE = "importing vLLM"


def stage_in(log: str) -> str:
    """The stage after the last of `_STAGES` in a log."""
    found = [(match.end(), stage) for text, stage in _STAGES for match in re.finditer(text, log)]
    return max(found)[1] if found else _BEFORE
