"""The nouns that travel through the loop, with their shapes.

T = tokens of one packed microbatch on a rank, S = its sequences, N = rollouts of one batch,
P / R = prompt / response tokens of one rollout. torch is imported by what holds tensors, when it is
made: `check --data` reads prompts on machines without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from sfpo_megatron.config.reward import RewardChoice

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
"""A value that was read from JSON or YAML, or is to be written as such."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Prompt:
    """One problem, ready to be generated from."""

    id: str
    """Stable name: `<source>/<index>`."""
    text: str
    """What the tokenizer saw (after template and suffix)."""
    token_ids: tuple[int, ...]  # [P]
    question: str
    """The problem itself, as the source states it."""
    answer: str
    """The reference answer; empty where the task has none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs besides (reasoning_gym: its entry)."""
    reward: RewardChoice | None = None
    """Reward of its source; None: reward.function."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Rollout:
    """One sampled completion of a prompt, scored."""

    prompt_id: str
    sample: int
    """Which sibling of its group, from 0."""
    prompt_token_ids: tuple[int, ...]  # [P]
    token_ids: tuple[int, ...]  # [R], the end-of-sequence token included when it came
    generator_logprobs: tuple[float, ...]  # [R], nats, after temperature and top_p
    response_mask: tuple[bool, ...]  # [R], True where the model generated the token: trained on
    finished: bool
    """True: ended by itself; False: cut at max_response_tokens."""
    text: str
    reward: float
    correct: bool
    weight_version: int
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward function returned besides the reward, by name."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment measured."""
    scored_at: int = 0
    """First character of `text` that the reward function got: after the turns before an answer."""

    @property
    def scored_text(self) -> str:
        return self.text[self.scored_at :]

    @property
    def num_generated(self) -> int:
        """Number of tokens that the model generated."""
        return sum(self.response_mask)


@dataclass(kw_only=True, frozen=True, slots=True)
class RolloutBatch:
    """One train step's rollouts as flat tensors: what rank 0 sends to every rank, and what
    `debug.save_rollouts` writes. Siblings are adjacent: group g is rows [g*G, (g+1)*G)."""

    group_size: int  # G
    prompt_lengths: Tensor  # [N] int64
    response_lengths: Tensor  # [N] int64
    token_ids: Tensor  # [sum(P + R)] int64, prompt then response, rollout after rollout
    generator_logprobs: Tensor  # [sum R] float32
    response_mask: Tensor  # [sum R] bool, True where the model generated the token: trained on
    rewards: Tensor  # [N] float32
    correct: Tensor  # [N] bool
    finished: Tensor  # [N] bool, False where the response was cut at max_response_tokens
    weight_version: int

    def __post_init__(self) -> None:
        import torch

        num, num_response = self.prompt_lengths.numel(), int(self.response_lengths.sum())
        sizes = {
            "response_lengths": num,
            "token_ids": int(self.prompt_lengths.sum()) + num_response,
            "generator_logprobs": num_response,
            "response_mask": num_response,
            "rewards": num,
            "correct": num,
            "finished": num,
        }
        for name, size in sizes.items():
            found = tuple(getattr(self, name).shape)
            if found != (size,):
                raise ValueError(
                    f"a batch of {num} rollouts and {num_response} response tokens: found {name} "
                    f"of shape {found}, expected ({size},)"
                )
        if self.response_mask.dtype != torch.bool:
            raise ValueError(
                f"response_mask: found {self.response_mask.dtype}, expected torch.bool"
            )

    @property
    def num_rollouts(self) -> int:
        return self.prompt_lengths.numel()

    @property
    def trained_lengths(self) -> Tensor:
        """[N] int64: response tokens of each rollout that are trained on."""
        from torch.nn.functional import pad

        before = pad(self.response_mask.cumsum(0), (1, 0))  # [sum R + 1]
        ends = self.response_lengths.cumsum(0)
        return before[ends] - before[ends - self.response_lengths]

    @staticmethod
    def from_rollouts(rollouts: list[Rollout], group_size: int) -> RolloutBatch:
        """Flatten `rollouts`, given group after group."""
        import torch

        versions = {rollout.weight_version for rollout in rollouts}
        if len(versions) != 1:
            raise ValueError(f"a batch of mixed weight versions: {sorted(versions)}")
        for r in rollouts:
            if not len(r.token_ids) == len(r.generator_logprobs) == len(r.response_mask):
                raise ValueError(
                    f"rollout {r.sample} of prompt {r.prompt_id}: found {len(r.token_ids)} "
                    f"token_ids, {len(r.generator_logprobs)} generator_logprobs and "
                    f"{len(r.response_mask)} response_mask, expected as many of each"
                )
        tokens = [t for r in rollouts for t in (*r.prompt_token_ids, *r.token_ids)]
        logprobs = [x for r in rollouts for x in r.generator_logprobs]
        mask = [x for r in rollouts for x in r.response_mask]
        return RolloutBatch(
            group_size=group_size,
            prompt_lengths=torch.tensor([len(r.prompt_token_ids) for r in rollouts]),
            response_lengths=torch.tensor([len(r.token_ids) for r in rollouts]),
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            generator_logprobs=torch.tensor(logprobs, dtype=torch.float32),
            response_mask=torch.tensor(mask, dtype=torch.bool),
            rewards=torch.tensor([r.reward for r in rollouts], dtype=torch.float32),
            correct=torch.tensor([r.correct for r in rollouts]),
            finished=torch.tensor([r.finished for r in rollouts]),
            weight_version=versions.pop(),
        )


@dataclass(kw_only=True, slots=True)
class Microbatch:
    """A packed (THD) forward of a rank. Position t predicts `labels[t]`, the next token of its own
    sequence; every per-token field below stands at the position that predicts the token."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    labels: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool, True where labels[t] is a response token that is trained on
    cu_seqlens: Tensor  # [S + 1] int32, of this rank's tokens
    rollouts: Tensor  # [S] int64, row of each sequence in the batch; -1 for padding
    max_seqlen: int
    """Longest whole sequence, where context-parallel ranks share them."""
    num_tokens: int
    """Tokens of real sequences (context parallelism pads each of them); the rest, at the end, is
    padding."""
    advantages: Tensor  # [T] float32
    generator_logprobs: Tensor  # [T] float32
    old_logprobs: Tensor | None = None  # [T] float32, set once, before the first update
    ref_logprobs: Tensor | None = None  # [T] float32, set once, where a reference is kept


@dataclass(kw_only=True, frozen=True, slots=True)
class Minibatch:
    """One optimizer step on one data-parallel rank."""

    microbatches: tuple[Microbatch, ...]
    global_valid_tokens: int
    """Tokens under the loss masks over all data-parallel ranks: what means over tokens divide by.
    0 if every rollout is masked out."""
    global_num_sequences: int
    """Sequences with such tokens over all data-parallel ranks."""
    global_tokens: int
    """All its tokens over all data-parallel ranks, without padding."""
    global_padded_tokens: int
    """The same with padding."""
