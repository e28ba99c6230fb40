"""Model families: Hugging Face names <-> Megatron (TE / dist-checkpoint) names.

`known/` has one record a family; `shape.py` reads a config.json by it, `table.py` lists the tensors
(neither imports torch), `operations.py` takes them apart and puts them together.
"""
