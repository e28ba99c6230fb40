"""Why a Ray cluster that somebody else started does not let us in, as far as one can tell here.

Ray says "failed to connect" for a token that is missing, for one that is wrong and for tokens that
are on there and off here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_PORT = 6379  # Ray's own default
_FILE = "RAY_AUTH_TOKEN_PATH to a file with its token (~/.ray/auth_token on its head)"


def wrong_address(address: str) -> str | None:
    """What to write in place of an address that no driver can join; None for one that can be."""
    if "://" in address:
        host = address.partition("://")[2].rpartition(":")[0] or "HOST"
        return f"HOST:PORT of its head, {host}:{_PORT} by default: Ray Client (ray://) cannot serve"
    host, _, port = address.rpartition(":")
    if address == "auto" or (host and port.isdigit()):
        return None
    return f"HOST:PORT of its head, {address.rstrip(':')}:{_PORT} by default"


def what_is_missing(environ: Mapping[str, str] = os.environ) -> str:
    """What keeps us out of a cluster that answers on its port: one line, with what to set."""
    mode, source = environ.get("RAY_AUTH_MODE", ""), _token_source(environ)
    if mode.lower() != "token":
        found = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set"
        token = f"; the token is taken from {source}" if source else f", and {_FILE}"
        return f"{found} here: if tokens are on there, set RAY_AUTH_MODE=token{token}"
    if source is None:
        where = environ.get("RAY_AUTH_TOKEN_PATH")
        found = f"and {where} holds none" if where else "and there is no token"
        return (
            f"RAY_AUTH_MODE=token {found} here: set {_FILE}, or unset RAY_AUTH_MODE if the cluster "
            "has no tokens"
        )
    return (
        f"RAY_AUTH_MODE=token, and the token from {source} is not the cluster's: set {_FILE}, or "
        "unset RAY_AUTH_MODE if the cluster has no tokens"
    )


def _token_source(environ: Mapping[str, str]) -> str | None:
    """The place that Ray takes a token from: it looks no further than the first that is set."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    file = environ.get("RAY_AUTH_TOKEN_PATH") or os.path.join(
        environ.get("HOME", ""), ".ray/auth_token"
    )
    try:
        with open(file, encoding="utf-8") as stream:
            return file if stream.read().strip() else None
    except OSError:
        return None
