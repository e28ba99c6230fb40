"""FP8 recipes: Megatron subclasses DelayedScaling at import; none can be used here."""

from __future__ import annotations


class DelayedScaling:
    def __init__(self, **settings: object) -> None:
        raise NotImplementedError("the TransformerEngine stand-in has no FP8")
