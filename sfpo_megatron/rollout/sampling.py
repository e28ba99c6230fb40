"""What to generate: the request, each sample's seed, and the tokens that end a response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ROLLOUTS_PER_CALL = 16
"""Rollouts in a call of an engine: fewer calls for Ray, more overlap for scoring."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RolloutRequest:
    """`num_samples` rollouts of each prompt, under the engines' current weights."""

    id: str
    """Unique among the requests that are not collected yet."""
    step: int
    """The train step; part of every sample's seed."""
    prompts: tuple[Prompt, ...]
    num_samples: int
    temperature: float
    """0 is greedy."""
    top_p: float
    max_response_tokens: int
    num_groups: int | None = None
    """Groups in the answer; None: those of `prompts`, all of them."""
    drop: tuple[str, ...] = ()
    """Kinds of groups to replace, as rollout.drop_groups names them."""
    refills: tuple[tuple[Prompt, ...], ...] = ()
    """Further rounds of prompts, generated from as long as groups are missing."""

    @property
    def rounds(self) -> tuple[tuple[Prompt, ...], ...]:
        return (self.prompts, *self.refills)


@dataclass(kw_only=True, frozen=True, slots=True)
class GenerationSettings:
    """How a rollout is sampled; a call of an engine has one for each of its rollouts."""

    temperature: float
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(kw_only=True, frozen=True, slots=True)
class Completion:
    """One generated response."""

    token_ids: tuple[int, ...]  # [R], the stop token included when it came
    logprobs: tuple[float, ...]  # [R], nats, after temperature and top_p
    finished: bool
    """True: a stop token came; False: cut at max_response_tokens."""


def eval_request(
    config: RunConfig, request_id: str, prompts: Sequence[Prompt], *, step: int
) -> RolloutRequest:
    """`eval.n` rollouts of held-out prompts, sampled as an evaluation is."""
    return RolloutRequest(
        id=request_id,
        step=step,
        prompts=tuple(prompts),
        num_samples=config.eval.n,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_response_tokens=config.eval_response_tokens,
    )


def check_lengths(request: RolloutRequest, config: RunConfig) -> None:
    """Raise RolloutError for a request whose prompts or responses an engine has no room for."""
    rollout, limit = config.rollout, config.engine_tokens - config.rollout.max_prompt_tokens
    if not 1 <= request.max_response_tokens <= limit:
        raise RolloutError(
            f"request {request.id}: found max_response_tokens {request.max_response_tokens}, "
            f"expected 1 to {limit} (rollout.max_response_tokens, eval.max_response_tokens)"
        )
    for prompt in (prompt for prompts in request.rounds for prompt in prompts):
        if not 1 <= len(prompt.token_ids) <= rollout.max_prompt_tokens:
            raise RolloutError(
                f"prompt {prompt.id}: found {len(prompt.token_ids)} tokens, expected 1 to "
                f"rollout.max_prompt_tokens ({rollout.max_prompt_tokens}); raise that or set "
                "data.on_bad_row=skip"
            )


def request_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The sampling seed of one rollout: 63 bits, whatever engine it runs on.

    A hash, not Python's `hash`, which differs from process to process; the fields are separated so
    that prompt "a/1" sample 12 is not prompt "a/11" sample 2.
    """
    return _hashed(run_seed, step, prompt_id, sample)


def call_seed(rollout_seed: int, number: int) -> int:
    """The seed of a rollout's generation `number`, from 0; the first has the rollout's own."""
    return rollout_seed if number == 0 else _hashed(rollout_seed, number)


def branch_seed(rollout_seed: int, number: int) -> int:
    """What stands for the rollout's seed in a branch that runs beside its other calls."""
    return _hashed(rollout_seed, "branch", number)


def _hashed(*parts: int | str) -> int:
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stop_token_ids(model_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence token that the model's directory names.

    The tokenizer's and the generation config's both count: chat models name the end of a turn in
    one and the end of the text in the other. config.json decides only when both are silent.
    """
    found = set(_eos_of(model_path / "generation_config.json"))
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    found = found or set(_eos_of(model_path / "config.json"))
    if not found:
        raise ValueError(
            f"{model_path}: found no eos_token_id in the tokenizer, generation_config.json or "
            "config.json, expected one; without it no response ever ends: name it in one of them"
        )
    return tuple(sorted(found))


def _eos_of(file: Path) -> list[int]:
    if not file.is_file():
        return []
    value = json.loads(file.read_text()).get("eos_token_id")
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
