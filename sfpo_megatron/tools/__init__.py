"""Tools that a model may call: one built-in tool a file, or a function of the user's own.

`plugins.TOOL` lists them. A tool is a function with typed parameters and a docstring in Google's
style, which say to the model what it is called with: `declared.py` reads them. Its keyword-only
parameters are settings of the config, which no model sees. What it returns is told to the model,
and so is what it raises. Models write the arguments, so a run calls tools in `pool.ToolPool`'s
processes, never in its own.
"""

from __future__ import annotations


class ToolError(ValueError):
    """A tool refuses its arguments: what the model is told, without a traceback."""
