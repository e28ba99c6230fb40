"""Chat completions in the OpenAI protocol, answered by the engines and recorded as tokens.

`protocol.py` reads requests and writes answers. `session.py` turns one agent's requests into one
growing sequence of tokens. `server.py` serves sessions on loopback, in a thread of its own.
docs/agents.md has what a client may ask for.
"""
