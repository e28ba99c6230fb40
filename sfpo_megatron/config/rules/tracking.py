"""Rules of check.py about metrics sinks: the libraries that they write with. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.plugins import SINK

_LIBRARIES = ("tensorboard", "wandb", "mlflow")
"""Sinks that are named as their library is, and as the extra in setup.py that brings it."""


def sink_libraries(config: RunConfig) -> Iterator[Problem]:
    """What a sink imports is installed."""
    for name in config.tracking.sinks:
        if name not in _LIBRARIES:
            continue
        for library in _needed(name):
            if not _is_installed(library):
                yield Problem(
                    SINK.key,
                    f"{name}, and no library {library} in this Python",
                    f"{library} to write with",
                    f"pip install 'sfpo-megatron[{name}]', or leave {name} out",
                    "error_here",
                )
                break


def _needed(sink: str) -> tuple[str, ...]:
    if sink == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return ("mlflow", "sqlalchemy", "alembic")  # its store is a database in RUN
    return (sink,)


def _is_installed(library: str) -> bool:
    """Whether a package of this name is there; a folder `wandb` in the working directory, which the
    library makes of its own, is none."""
    spec = find_spec(library)
    return spec is not None and spec.origin is not None
