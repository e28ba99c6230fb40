"""Rollouts: the controller and the vLLM engines as Ray actors, and rank 0's client to them."""

import os

from sfpo_megatron.host.variables import settle

# Before the first `import ray`, which reads it: a cluster of our own takes 127.0.0.1 as its node's
# address (Ray's mode for one machine), and its servers then listen on loopback only. Given
# `_node_ip_address="127.0.0.1"` alone, ray.init replaces it by an address others can reach.
if not os.environ.get("RAY_ADDRESS"):
    settle("rank", "starts a Ray of its own")
