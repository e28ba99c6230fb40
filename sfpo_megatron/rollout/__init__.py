"""Rollouts: vLLM engines in Ray actors, driven by one controller that rank 0 talks to."""
