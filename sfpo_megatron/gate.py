"""The entropy gate, SFPO's stopping rule: once the policy entropy rises, every batch gets one pass.

With the mean m and population standard deviation s of a window of entropies, the newest entropy H
crosses at

    (H - m) / s >= zscore_threshold     or     H >= (1 + relative_threshold) * m

(two-sided: at a fall as well), and the gate closes at the `patience`-th crossing in a row. The
defaults are the released reference's (ray_trainer.py): z >= 1 over 30 steps, H itself among them,
at the first crossing. The paper's Algorithm 1 has |z|: `two_sided`. Flat entropy with some noise
crosses that soon; docs/algorithm.md has settings that it does not cross. No torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfpo_megatron.config.tree import SFPOConfig

_LEAST_STD = 1e-9


@dataclass(kw_only=True, frozen=True, slots=True)
class Baseline:
    """What the newest entropy is judged by."""

    mean: float
    std: float
    """Population standard deviation."""

    @classmethod
    def of(cls, entropies: Sequence[float]) -> Baseline:
        """Mean and deviation of these entropies (nats)."""
        mean = math.fsum(entropies) / len(entropies)
        distance = math.dist(entropies, [mean] * len(entropies))
        return cls(mean=mean, std=distance / math.sqrt(len(entropies)))

    def zscore(self, entropy: float) -> float:
        return (entropy - self.mean) / (self.std + _LEAST_STD)


class EntropyGate:
    """Decides, before each train step, whether SFPO is still on.

    `observe` takes the exact mean token entropy (nats) of a step's slow correction; nothing is
    judged before the window is full. `latch` keeps the gate closed for good. To be decided on one
    rank and broadcast: ranks that branch apart hang each other.

    zscore_threshold: None for none; without a relative_threshold either, entropy closes nothing.
    warmup_steps: so many entropies are let pass at first, unseen.
    window_excludes_newest: the window is of the entropies before the newest one. Among them it
    could not be more than sqrt(window - 1) deviations away.
    patience: while fewer than these have crossed in a row, the window waits: they would raise it.
    """

    def __init__(
        self,
        *,
        window: int = 30,
        zscore_threshold: float | None = 1.0,
        two_sided: bool = False,
        latch: bool = True,
        stop_step: int | None = None,
        warmup_steps: int = 0,
        patience: int = 1,
        window_excludes_newest: bool = False,
        relative_threshold: float | None = None,
    ) -> None:
        self._window: deque[float] = deque(maxlen=window)
        self._size = window
        self._threshold = zscore_threshold
        self._relative = relative_threshold
        self._two_sided = two_sided
        self._latch = latch
        self._stop_step = stop_step
        self._warmup = warmup_steps
        self._patience = patience
        self._excludes_newest = window_excludes_newest
        self._num_seen = 0
        self._streak: list[float] = []
        """Crossings in a row that the window waits for."""
        self._num_crossed = 0
        self._tripped = False
        self.baseline: Baseline | None = None
        """What the newest entropy was judged by; None before the window is full."""
        self.zscore: float | None = None
        """z of the newest entropy; None before the window is full."""

    @staticmethod
    def of(config: SFPOConfig) -> EntropyGate:
        """The gate that the section sfpo asks for."""
        return EntropyGate(
            window=config.entropy_window,
            zscore_threshold=config.entropy_zscore_threshold,
            two_sided=config.trigger == "two_sided",
            latch=config.latch,
            stop_step=config.stop_step,
            warmup_steps=config.entropy_warmup_steps,
            patience=config.entropy_patience,
            window_excludes_newest=config.entropy_window_excludes_newest,
            relative_threshold=config.entropy_relative_threshold,
        )

    def observe(self, entropy: float) -> None:
        """Add the entropy of the step that just ended."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy {entropy!r} of the last step is not a finite number")
        self._num_seen += 1
        if self._num_seen <= self._warmup:
            return
        self._num_crossed = self._num_crossed + 1 if self._crosses(entropy) else 0
        patient = self._num_crossed >= self._patience
        self._streak.append(entropy)
        if patient or not self._num_crossed:
            self._window.extend(self._streak)
            self._streak.clear()
        self._tripped = patient or (self._latch and self._tripped)

    def is_open(self, step: int) -> bool:
        """Whether train step `step` (the first is 1) makes fast passes."""
        stopped = self._stop_step is not None and step >= self._stop_step
        return not (self._tripped or stopped)

    @property
    def has_tripped(self) -> bool:
        """Whether entropy keeps it closed."""
        return self._tripped

    @property
    def bound(self) -> float | None:
        """The lowest entropy above the mean that crosses; None before the window is full, and where
        none does."""
        if self.baseline is None:
            return None
        mean, rises = self.baseline.mean, list[float]()
        if self._threshold is not None:
            rises.append(self._threshold * self.baseline.std)
        if self._relative and mean > 0:
            rises.append(self._relative * mean)
        return mean + min(rises) if rises else None

    @property
    def low_bound(self) -> float | None:
        """The highest entropy below the mean that crosses; None where `bound` is, and unless the
        gate is two-sided."""
        bound = self.bound
        if bound is None or self.baseline is None or not self._two_sided:
            return None
        return 2 * self.baseline.mean - bound

    @property
    def is_flat(self) -> bool:
        """Whether the window shows neither a trend, its newer half being within two standard errors
        of its older half, nor a jump, the newest entropy being within three deviations of the
        others. A gate that has closed on it has closed on noise."""
        values = list(self._window)
        middle = len(values) // 2
        older, newer = Baseline.of(values[:middle]), Baseline.of(values[middle:])
        error = math.sqrt(2 * (older.std**2 + newer.std**2) / len(values))
        has_trend = abs(newer.mean - older.mean) > 2 * error
        return not has_trend and abs(Baseline.of(values[:-1]).zscore(values[-1])) <= 3

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": list(self._window),
            "tripped": self._tripped,
            "streak": list(self._streak),
            "num_crossed": self._num_crossed,
            "num_seen": self._num_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved state; one of before there were streaks has none."""
        self._window.clear()
        self._window.extend(state["window"])
        self._tripped = state["tripped"]
        self._streak = list(state.get("streak", []))
        self._num_crossed = state.get("num_crossed", 0)
        self._num_seen = state.get("num_seen", len(self._window))

    def _crosses(self, entropy: float) -> bool:
        """Judge the newest entropy."""
        before = list(self._window)
        judged = before if self._excludes_newest else [*before[1 - self._size :], entropy]
        if len(judged) < self._size:
            return False
        self.baseline = Baseline.of(judged)
        self.zscore = self.baseline.zscore(entropy)
        z, mean = self.zscore, self.baseline.mean
        rise = entropy - mean
        if self._two_sided:
            z, rise = abs(z), abs(rise)
        # No share of nothing: a policy that is certain stays so without a rise.
        rises = self._relative is not None and rise >= self._relative * mean > 0
        return rises or (self._threshold is not None and z >= self._threshold)
