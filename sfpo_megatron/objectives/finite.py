"""Bounds that keep log-probs and what is made of them finite; nothing else is changed by a bit.

exp overflows float32 at 88.8, and an infinite ratio makes NaN of a gradient that the clip, an
advantage of 0 or a rejection had set to 0. NaN itself passes through, and its gradient, which clamp
would hide: a step of NaN is skipped and counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp is taken of at most this, 4.9e8: far beyond every clip, and bounded when multiplied."""

LEAST_LOGPROB = -1e4
"""Stands for a log-prob of -inf: the difference of two of them is 0, not NaN."""


def finite(logprobs: Tensor) -> Tensor:
    """At least LEAST_LOGPROB; without a gradient below it, as nothing raises a logit of -inf."""
    return torch.where(logprobs < LEAST_LOGPROB, LEAST_LOGPROB, logprobs)


def bounded(log_ratio: Tensor) -> Tensor:
    """At most MAX_LOG_RATIO; without a gradient above it."""
    return torch.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
