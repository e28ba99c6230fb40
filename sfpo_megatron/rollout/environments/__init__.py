"""Environments of several turns, to be used by name or as the base of your own.

`conversation.py` is the loop: the model's turns, and what is told to it between them.
`tool_environment.py` tells it the results of the tools that it calls (`math_tool`).
docs/environments.md leads from a config to an environment of your own.
"""
