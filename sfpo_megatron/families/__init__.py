"""Model families: Hugging Face names <-> Megatron (TE / dist-checkpoint) names.

`shape.py` reads a config.json (no torch); `rules.py` has the operations; one table a family file.
"""
