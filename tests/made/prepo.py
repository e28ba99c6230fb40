"""PrePO's reposition in float64, written out. Independent of sfpo_megatron (no import of it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST = 1e-3
"""Least displacement that is divided by, in root mean squares."""


def predicted(
    weights: Sequence[Tensor], *, decay: float, horizon: int, alpha: float, rms: float | None = None
) -> Tensor:
    """theta_a, float64, from theta_0, theta_1 and theta_2. decay: what a pass leaves of a weight
    that no gradient moves; rms: of the first displacement over the whole weight, where `weights`
    are only a part of it."""
    start, first, second = (w.double() for w in weights)
    before, after = decay * start - first, decay * first - second
    if rms is None:
        rms = root_mean_square([before])
    active = before.abs() > LEAST * rms
    ratio = (after / torch.where(active, before, 1.0)).clamp(-2, 3)
    real = sum(ratio**n for n in range(2))
    wanted = sum(ratio**n for n in range(horizon))
    usable = active & (real.abs() > 1e-8)
    scale = (wanted / torch.where(usable, real, 1.0)).clamp(1, horizon / 2 + 1)
    return start + alpha * torch.where(usable, scale, 1.0) * (second - start)


def undecided(moved: Tensor, start: Tensor, rms: float) -> Tensor:
    """Which first displacements are so near to the least one that float32 may say otherwise: the
    scale jumps there."""
    least = LEAST * rms
    return (moved.abs() - least).abs() <= 0.3 * least + 1e-6 * start.double().abs()


def root_mean_square(parts: Sequence[Tensor]) -> float:
    """Over the elements of all parts."""
    total = sum(float(part.double().square().sum()) for part in parts)
    return (total / max(1, sum(part.numel() for part in parts))) ** 0.5


FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}
"""Hugging Face weights that Megatron has as one."""


def weight_rms(moved: Mapping[str, Tensor]) -> dict[str, float]:
    """By Hugging Face name, the root mean square of what is one weight in Megatron."""
    whole = {name: ".".join(FUSED.get(part, part) for part in name.split(".")) for name in moved}
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in moved.items():
        parts.setdefault(whole[name], []).append(tensor)
    return {name: root_mean_square(parts[whole[name]]) for name in moved}
