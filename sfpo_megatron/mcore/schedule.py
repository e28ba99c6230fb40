"""The learning rate over ticks, one a train step, by Megatron's OptimizerParamScheduler.

With w ticks of warm-up, N in all, d of wsd's decay, and t from 1:

    t <= w      peak t / w
    constant    peak
    linear      floor + (peak - floor) (1 - r)                r = (t - w) / (N - w)
    cosine      floor + (peak - floor) (1 + cos(pi r)) / 2
    wsd         peak up to t = N - d, then floor + (peak - floor) (N - t) / d
    t > N       floor (constant: peak)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfpo_megatron.config.training import SFTConfig, TrainConfig, decay_steps

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(kw_only=True, frozen=True, slots=True)
class LRSchedule:
    """The learning rate over optimizer-scheduler ticks."""

    peak: float
    floor: float
    warmup_ticks: int
    total_ticks: int
    style: str
    """constant | linear | cosine | wsd"""
    decay_ticks: int = 0
    """wsd: ticks of its decay."""

    @property
    def lowest(self) -> float:
        """The floor as Megatron takes it: not above the peak, which a constant rate may have it."""
        return min(self.floor, self.peak)


def train_schedule(train: TrainConfig) -> LRSchedule:
    """What the section train asks for; its length is known."""
    optimizer = train.optimizer
    return LRSchedule(
        peak=optimizer.lr,
        floor=optimizer.lr_floor,
        warmup_ticks=optimizer.lr_warmup_steps,
        total_ticks=train.steps,
        style=optimizer.lr_schedule,
        decay_ticks=decay_steps(optimizer, train.steps),
    )


def sft_schedule(sft: SFTConfig) -> LRSchedule:
    """What the section sft asks for; its length is known."""
    return LRSchedule(
        peak=sft.lr,
        floor=sft.lr_floor,
        warmup_ticks=sft.warmup_of(sft.steps),
        total_ticks=sft.steps,
        style=sft.lr_schedule,
        decay_ticks=decay_steps(sft, sft.steps),
    )


def scheduler_of(
    optimizer: MegatronOptimizer, schedule: LRSchedule, weight_decay: float
) -> OptimizerParamScheduler:
    """Megatron's scheduler before its first tick, where the learning rate is 0 or the peak."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    is_wsd = schedule.style == "wsd"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=schedule.peak,
        min_lr=schedule.lowest,
        lr_warmup_steps=schedule.warmup_ticks,
        lr_decay_steps=max(schedule.total_ticks, schedule.warmup_ticks + 1),
        lr_decay_style="WSD" if is_wsd else schedule.style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay_ticks if is_wsd else None,
        lr_wsd_decay_style="linear" if is_wsd else None,
    )
