"""Hugging Face <-> Megatron checkpoints in one plain process: no GPU, no group, no Megatron."""
