"""Estimates of KL(pi || pi_ref) from single sampled tokens (http://joschu.net/blog/kl-approx.html).

d  = log pi_ref(y_t) - log pi(y_t)
k1 = -d                 unbiased, of either sign; as a loss its expected gradient is 0
k2 = d^2 / 2            biased; its gradient is that of the KL
k3 = exp(d) - 1 - d     unbiased and >= 0; d at most 20 (finite.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfpo_megatron.config.objective import KLConfig
from sfpo_megatron.objectives.finite import bounded, finite


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor, config: KLConfig
) -> Tensor:
    """[T], 0 outside the mask; differentiable by `logprobs`."""
    d = torch.where(loss_mask, finite(ref_logprobs) - finite(logprobs), 0.0)
    if config.estimator == "k1":
        return -d
    if config.estimator == "k2":
        return d.square() / 2
    d = bounded(d)
    return torch.expm1(d) - d
