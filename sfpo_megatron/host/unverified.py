"""One line in the log, once a process, for code whose hardware was never at hand."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def log_unverified(what: str) -> None:
    """`what` was written to upstream's contract and never run (docs/verified.md)."""
    log.warning("%s: unverified on this hardware, see docs/verified.md", what)
