"""How a rank cuts its part of a batch, by the run's layout and by what Megatron's schedules take.

Not exercised here: the schedules.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.batching import split
from sfpo_megatron.mcore.batches import batch_layout
from sfpo_megatron.mcore.capabilities import Capabilities

NO_TE = Capabilities(cuda=False, transformer_engine=None, apex=False, layers="local", adam="torch")
GROUP = "microbatch_group_size_per_vp_stage"


@pytest.mark.parametrize(
    ("virtual", "transformer", "expected"),
    [
        (None, {}, 3),
        (None, {GROUP: 5}, 3),  # of the interleaved schedule alone
        (2, {}, 4),
        (2, {GROUP: None}, 4),
        (2, {GROUP: 5}, 5),
    ],
)
def test_whole_groups_of_microbatches(
    virtual: int | None, transformer: dict[str, Any], expected: int
) -> None:
    """Three microbatches' worth of rollouts on two stages: Megatron's schedule raises in the middle
    of a run at a batch that makes fewer microbatches than a group has."""
    config = run_config(
        parallel={"pipeline": 2, "virtual_pipeline": virtual},
        megatron={"transformer": transformer},
        train={"microbatch_size": 1},
    )
    policy: Any = SimpleNamespace(
        capabilities=NO_TE,
        layout=SimpleNamespace(data_rank=0, data_size=1, context_rank=0, context_size=1),
        shape=SimpleNamespace(attention_break_even=math.inf),
    )
    (microbatches,) = split([7, 5, 6], batch_layout(config, policy, 1))
    assert len(microbatches) == expected
