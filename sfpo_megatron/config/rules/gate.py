"""Settings of the entropy gate that leave it nothing to decide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig


def gate(config: RunConfig) -> Iterator[Problem]:
    sfpo, steps = config.sfpo, config.train.num_steps
    if sfpo.num_fast_passes == 0:
        return
    if steps is not None and sfpo.entropy_warmup_steps >= steps:
        yield Problem(
            "sfpo.entropy_warmup_steps",
            str(sfpo.entropy_warmup_steps),
            f"fewer than the run's train steps ({steps})",
            "shorten the warm-up: the gate would see no entropy at all",
        )
    highest, threshold = math.sqrt(sfpo.entropy_window - 1), sfpo.entropy_zscore_threshold
    if (
        threshold is not None
        and threshold > highest
        and not sfpo.entropy_window_excludes_newest
        and sfpo.entropy_relative_threshold is None
    ):
        yield Problem(
            "sfpo.entropy_zscore_threshold",
            f"{threshold:g} with entropy_window {sfpo.entropy_window}",
            f"at most sqrt({sfpo.entropy_window} - 1) = {highest:.3g}",
            "inside its own window no entropy is farther from the mean, so the gate never closes; "
            "lower it, or set sfpo.entropy_window_excludes_newest=true; null where that is meant",
            "warning",
        )
