"""Mistral: Llama's layer; the sliding window is no weight (families/shape.py)."""

from sfpo_megatron.families import llama

LAYER = llama.LAYER
