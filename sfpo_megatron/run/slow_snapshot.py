"""The snapshot that a config asks for."""

from __future__ import annotations

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.mcore.trajectory import MainParamTrajectory
from sfpo_megatron.sfpo import SlowSnapshot, Snapshot
from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.moments import MomentSnapshot
from sfpo_megatron.snapshots.predicted import PredictedSnapshot, Scales
from sfpo_megatron.snapshots.spanned import SpannedSnapshot


def slow_snapshot(config: RunConfig, policy: Policy, scales: Scales) -> Snapshot:
    """The snapshot that `sfpo.trajectory`, `snapshot` and `moments` ask for; a predicted one shows
    `scales` what it scales by. Collective."""
    snapshot: Snapshot
    if config.sfpo.trajectory == "predicted" and config.sfpo.num_fast_passes:
        snapshot = PredictedSnapshot(
            MainParamTrajectory(policy),
            horizon=config.sfpo.num_fast_passes,
            steps_per_pass=config.train.minibatches_per_step,
            scales=scales,
        )
    elif config.sfpo.snapshot == "host":
        snapshot = HostSnapshot(policy.shards)
    else:
        snapshot = SlowSnapshot(policy.shards)
    if config.sfpo.moments != "keep":
        snapshot = MomentSnapshot(snapshot, policy.shards, mode=config.sfpo.moments)
    return SpannedSnapshot(snapshot)
