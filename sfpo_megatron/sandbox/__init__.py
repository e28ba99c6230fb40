"""Processes with limits, for code that a model or a user wrote: reward functions and tools.

`process.py` is the parent's end and `limits.py` the process's own: time, memory, files, and that it
ends with its parent. `surroundings.py` and `output.py` keep one call from deciding the next.
"""
