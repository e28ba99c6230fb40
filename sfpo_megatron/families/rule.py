"""A `Rule` ties one Megatron tensor to the Hugging Face tensors it is made of. No torch.

Loading, export, refit, converters and planner all read the same rules, so a layout is written down
once; `operations.py` does what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Where = Literal["dense", "experts", "latent_query", "whole_query"]
"""Layers with an MLP or with experts; models whose queries are made from short vectors (multi-head
latent attention), or from the hidden state."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Rule:
    """One Megatron tensor and its Hugging Face parts. In a family's table `{layer}` stands for the
    layer index and `{expert}` for the global expert index."""

    megatron: str
    hf: tuple[str, ...]
    kind: Literal["copy", "qkv", "gate_up", "vocab"] = "copy"
    tp_dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks; None: every rank has all of it."""
    expert: bool = False
    """Belongs to one expert: on one expert-parallel rank only, and cut over the expert's own
    tensor-parallel ranks."""
    frozen: bool = False
    """A buffer that no optimizer holds, so that SFPO does not reposition it: loaded, refitted and
    exported as it came, in fp32 where the model's dtype is another."""
    only: Where | None = None
    """The layers that have it, where some have not; None: all."""

    def at(self, *, layer: int, expert: int = 0) -> Rule:
        index = {"layer": layer, "expert": expert}
        return replace(
            self,
            megatron=self.megatron.format(**index),
            hf=tuple(name.format(**index) for name in self.hf),
        )


def only(where: Where, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules, for those layers alone."""
    return tuple(replace(rule, only=where) for rule in rules)
