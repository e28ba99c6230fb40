"""Sends a run's metrics to its sinks, and does without one that fails."""

from __future__ import annotations

import math
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.unwinding import failures
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.plugins import SINK, PluginError
from sfpo_megatron.tracking.details import Details
from sfpo_megatron.tracking.sinks import Number, RunInfo, Sink, TakesDetails, TakesImportant


class Tracker:
    """The sinks that `tracking.sinks` names. For one rank only: rank 0."""

    def __init__(
        self,
        config: RunConfig,
        *,
        num_steps: int | None = None,
        eval_every: int | None = None,
        run_id: str = "",
        continued_step: int = 0,
    ) -> None:
        """PluginError for what cannot be loaded or is no sink; one that cannot be made is left out.
        `num_steps`, `eval_every`: of the run, where they are not those of `train` and `eval`;
        `run_id`, `continued_step`: as in `RunInfo`."""
        run = RunInfo(
            config=config,
            directory=RunDirectory.of(config.output_dir),
            num_steps=num_steps if num_steps is not None else config.train.steps,
            eval_every=eval_every if eval_every is not None else config.eval.every,
            run_id=run_id,
            continued_step=continued_step,
        )
        self._sinks: dict[str, Sink] = {}
        makers = {name: _load(name) for name in config.tracking.sinks}
        for name, make in makers.items():
            with self._left_out_if_it_fails(name):
                self._sinks[name] = make(run)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics, with a `step`: numbers and booleans, and anything with `.item()`.
        NaN and infinities become None."""
        clean = {name: _number(name, value) for name, value in metrics.items()}
        if "step" not in clean:
            raise ValueError(f"metrics without a step: {sorted(clean)}; add `step`")
        self._each(lambda sink: sink.log(dict(clean)))  # its own: it may change what it is given

    def details(self, details: Details) -> None:
        """Distributions and sample rollouts of a step that was logged, for the sinks that take
        them."""
        self._each(lambda sink: sink.details(details) if isinstance(sink, TakesDetails) else None)

    def progress(self, text: str) -> None:
        """A line for the person who watches; not a metric."""
        self._each(lambda sink: sink.text(text))

    def important(self, text: str) -> None:
        """A line that must not be missed: a warning, or how the run has ended."""
        self._each(
            lambda sink: (
                sink.important(text) if isinstance(sink, TakesImportant) else sink.text(text)
            )
        )

    def close(self) -> None:
        """Close every sink, the last one first."""
        for name, sink in reversed(self._sinks.items()):
            with self._left_out_if_it_fails(name):
                sink.close()
        self._sinks = {}

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._left_out_if_it_fails(name):
                action(sink)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        """A sink must not end a run: what it raises is named once, and it gets nothing more."""
        try:
            yield
        except (*failures(), CancelledError) as error:
            self._sinks = {other: sink for other, sink in self._sinks.items() if other != name}
            why = " ".join(f"{type(error).__name__}: {_text(error)}".split())
            text = f"warning: tracking.sinks: {name} failed and gets nothing more ({why})"
            with suppress(OSError):  # the terminal may be gone: then there is nobody to tell
                print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it is of a user's own class
        return "its text cannot be had"


class NoTracker:
    """What every rank but 0 has: it logs nothing."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Rank 0 has the same metrics."""

    def details(self, details: Details) -> None:
        """Rank 0 has the same batch."""

    def progress(self, text: str) -> None:
        """Rank 0 says it."""

    def important(self, text: str) -> None:
        """Rank 0 says it."""

    def close(self) -> None:
        """There is nothing to close."""

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(name: str) -> Callable[[RunInfo], Sink]:
    """What makes the sink; PluginError if there is none such, or its class is none of a sink."""
    make: Callable[[RunInfo], Sink] = SINK.load(name)
    methods = {"log": "log(self, metrics)", "text": "text(self, line)", "close": "close(self)"}
    missing = [form for method, form in methods.items() if not hasattr(make, method)]
    if missing and isinstance(make, type):
        raise PluginError(
            SINK.key,
            found=f"{name} without {' and '.join(missing)}",
            expected=f"a class with {', '.join(methods.values())}",
            fix="give the class what is missing",
        )
    return make


def _number(name: str, value: Any) -> Number:
    if hasattr(value, "item"):  # a torch or numpy scalar
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metric {name}: found {value!r}, expected a number or a boolean")
