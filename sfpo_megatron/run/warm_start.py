"""Opens a warm start: its directory and its examples, on rank 0 and before Megatron starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfpo_megatron.checkpoints.store import store_of
from sfpo_megatron.config.tree import DebugConfig, RunConfig
from sfpo_megatron.data.sft import SFTExample, SFTExamples
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.sampling import stop_token_ids
from sfpo_megatron.run.continuing import Start, find
from sfpo_megatron.run.ends import stop_watch
from sfpo_megatron.run.engineless import EnginelessFeed
from sfpo_megatron.run.held_out import Best
from sfpo_megatron.run.length import said_length, sft_length
from sfpo_megatron.run.opening import OpenedRun, other_ends
from sfpo_megatron.run.same_data import date_then, hold_to_data
from sfpo_megatron.run.same_model import hold_to_model, hold_weights_to_model
from sfpo_megatron.run.saved_rollouts import share
from sfpo_megatron.run.saving import read_run_state
from sfpo_megatron.run.sinks import open_sinks
from sfpo_megatron.run.together import end_together
from sfpo_megatron.tracking.tracker import Tracker
from sfpo_megatron.types import RolloutBatch


@dataclass(kw_only=True, frozen=True, slots=True)
class WarmStart:
    """An opened warm start."""

    opened: OpenedRun
    control: ControlGroup
    held_out: tuple[RolloutBatch, ...]
    """What the held-out loss is taken on, on every rank."""

    def next_batch(self, step: int) -> RolloutBatch:
        """The examples of a step, on every rank. Collective."""
        ends, is_main = self.opened.ends, self.opened.is_main
        return share(self.control, ends.feed.collect(step, _no_refit) if is_main else None)


def _no_refit() -> None:
    """There is no engine that could ask for weights."""


class ExampleFeed(EnginelessFeed):
    """Rank 0's examples, in the place where a run has rollouts."""

    def __init__(self, examples: SFTExamples, examples_per_step: int) -> None:
        self._examples = examples
        self._per_step = examples_per_step
        self._cursor: dict[str, Any] | None = None

    def collect(self, step: int, refit: Callable[[], None]) -> RolloutBatch:
        """The next examples; there is no engine to refit."""
        self._cursor = self._examples.stream.state_dict()
        return as_batch(self._examples.next_batch(self._per_step))

    def hand_back(self, step: int) -> None:
        """Read the examples that `collect` gave, which were not used, again."""
        if self._cursor is not None:
            self._examples.stream.load_state_dict(self._cursor)

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the examples."""
        return {"prompts": self._examples.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved cursor."""
        self._examples.stream.load_state_dict(state["prompts"])


@contextmanager
def open_warm_start(
    config: RunConfig, *, fresh: bool = False, accept_data_change: bool = False
) -> Iterator[WarmStart]:
    """Find what the run continues from, read the examples and open the sinks (rank 0); close
    everything at the end. `fresh`, `accept_data_change`: as `opening.open_run`. Collective."""
    config = replace(config, debug=DebugConfig())  # which is about rollouts
    control = ControlGroup(config.train.control_timeout_s)
    is_main, store = control.rank == 0, store_of(config)
    start = find(config, store, control, fresh=fresh, kind="sft")
    examples = read_examples(config, now=date_then(start.continued)) if is_main else None
    given = config
    config = sft_length(config, control, examples.epoch_size if examples is not None else 0)
    with ExitStack() as closing:
        ends = other_ends()
        if examples is not None:
            changed = _held_to_checkpoint(config, start, examples, accept_data_change)
            tracker = _open_sinks(given, config, start, examples, closing, changed)
            ends = replace(
                other_ends(),
                stop=stop_watch(config),
                tracker=tracker,
                feed=ExampleFeed(examples, config.sft.examples_per_step),
                best=Best(_print_of(examples.held_out)),
            )
        yield WarmStart(
            opened=OpenedRun(
                config=config,
                directory=RunDirectory.of(config.output_dir),
                is_main=is_main,
                start=start,
                store=store,
                ends=ends,
                closing=closing,
            ),
            control=control,
            held_out=tuple(_shared(control, config.sft.examples_per_step, examples)),
        )
        end_together(control)


def read_examples(config: RunConfig, *, now: str | None = None) -> SFTExamples:
    """The examples of a config, by its model's tokenizer; DataError for what cannot be learned.
    `now`: as for `PromptStream`."""
    path = config.model.path
    tokenizer = load_tokenizer(path)
    stop_ids = () if tokenizer.eos_token_id is None else stop_token_ids(Path(path), tokenizer)
    max_context = model_shape(read_hf_config(path)).max_context
    return SFTExamples(config, tokenizer, stop_ids=stop_ids, max_context=max_context, now=now)


def _open_sinks(
    given: RunConfig,
    config: RunConfig,
    start: Start,
    examples: SFTExamples,
    closing: ExitStack,
    changed: list[str],
) -> Tracker:
    num_steps, num_epochs = config.sft.steps, given.sft.num_epochs
    said = [f"warm start {RunDirectory.of(config.output_dir).path}: {num_steps} steps"]
    if num_epochs is not None:
        said.append(said_length(num_epochs, examples.epoch_size, num_steps, "examples"))
    tracker = open_sinks(
        given,
        config,
        start,
        closing,
        num_steps=num_steps,
        eval_every=config.sft.eval_every,
        said=[*said, *changed],
    )
    tracker.progress(examples.summary)
    return tracker


def _print_of(held_out: Iterable[SFTExample]) -> str:
    """One value for what the held-out loss is taken on; empty where nothing is held out."""
    found = [(one.prompt_ids, one.response_ids, one.learned) for one in held_out]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""


def _held_to_checkpoint(
    config: RunConfig, start: Start, examples: SFTExamples, accept: bool
) -> list[str]:
    """What is to be said of a change; it is refused before anything in output_dir is replaced."""
    if (found := start.continued) is None:
        if start.found is not None:
            hold_weights_to_model(config, start.found)
        return []
    state, directory = read_run_state(found.directory), RunDirectory.of(config.output_dir)
    hold_to_model(config, found, state, with_reference=False)
    said = hold_to_data(examples.stream, found, state, directory, accept=accept)
    return [said] if said else []


def _shared(
    control: ControlGroup, per_batch: int, examples: SFTExamples | None
) -> Iterator[RolloutBatch]:
    """The held-out examples in batches, on every rank. Collective."""
    held_out = examples.held_out if examples is not None else ()
    for begin in range(0, control.broadcast_json(len(held_out)), per_batch):
        part = list(held_out[begin : begin + per_batch])
        yield share(control, as_batch(part) if examples is not None else None)


def as_batch(examples: list[SFTExample]) -> RolloutBatch:
    """Examples in the layout of rollouts: what is learned stands where a response would."""
    prompts = [len(example.prompt_ids) for example in examples]
    responses = [len(example.response_ids) for example in examples]
    tokens = [t for e in examples for t in (*e.prompt_ids, *e.response_ids)]

    def none_of(dtype: torch.dtype, count: int = len(examples)) -> Tensor:
        return torch.zeros(count, dtype=dtype)

    return RolloutBatch(
        group_size=1,
        prompt_lengths=torch.tensor(prompts),
        response_lengths=torch.tensor(responses),
        token_ids=torch.tensor(tokens),
        generator_logprobs=none_of(torch.float32, sum(responses)),
        response_mask=torch.tensor([m for e in examples for m in e.learned], dtype=torch.bool),
        rewards=none_of(torch.float32),
        correct=none_of(torch.bool),
        finished=torch.ones(len(examples), dtype=torch.bool),
        weight_version=0,
    )
