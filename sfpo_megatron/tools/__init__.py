"""Tools that a model may call: one built-in tool a file, or a function of the user's own.

`plugins.TOOL` lists them. A tool is a function with typed parameters and a docstring in Google's
style, which say to the model what it is called with: `declared.py` reads them. Its keyword-only
parameters are settings of the config, which no model sees. What it returns is told to the model,
and so is what it raises. Models write the arguments, so a run calls tools in `pool.ToolPool`'s
processes, never in its own.
"""

from __future__ import annotations

import math

from sfpo_megatron.types import Json


def require_number(name: str, value: Json, *, whole: bool = False) -> None:
    """ValueError for a setting that is no number above 0: asked before a call, or a model would
    be told of it in each."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        expected = "a whole number >= 1" if whole else "a number > 0"
        raise ValueError(f"{name}: found {value!r}, expected {expected}; correct the setting")


class ToolError(ValueError):
    """A tool refuses its arguments: what the model is told, without a traceback."""


class NotBegun(ToolError):
    """The machine did not begin a program: nothing that the model has written. It is told of one
    that passes; one that stays ends the run (`pool.py`)."""
