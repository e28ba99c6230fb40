"""vocab_parallel_logprobs against float64 math over the full vocabulary: values and gradients.

Not exercised here: bf16 logits (test_logits covers the model's own), CUDA.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from harness import TP1, TP2, on_ranks
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

VOCAB, PADDED, TOKENS = 101, 104, 37


def full(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-prob of the label, entropy), in the dtype of `logits`, from its first VOCAB columns."""
    log_p = torch.log_softmax(logits[:, :VOCAB] / temperature, dim=1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)


@on_ranks(TP1, TP2, temperature=[1.0, 0.7], entropy_grad=[False, True])
def test_against_float64(bench: Workbench, temperature: float, entropy_grad: bool) -> None:
    """Small logits and logits up to +-80, in chunks of 8 tokens and in one."""
    for scale, chunk in itertools.product((1.0, 80.0), (8, 4096)):
        check(bench, scale, temperature, chunk, entropy_grad)


def check(
    bench: Workbench, scale: float, temperature: float, chunk: int, entropy_grad: bool
) -> None:
    """Values within 1e-6 + 4e-7 * |z|max: fp32 has 24 bits, and a logit of 80 / 0.7 alone is
    rounded to 4e-6. Gradients within 1e-5; the entropy's hold log p itself, so 1e-6 * |z|max more.
    Padding columns hold huge values that must not count."""
    from megatron.core import parallel_state

    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    random = torch.Generator().manual_seed(7)
    whole = torch.empty(TOKENS, PADDED).uniform_(-scale, scale, generator=random)
    whole[:, VOCAB:] = 1e4
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=random)
    labels[:4] = torch.tensor([0, 51, 52, 100])  # the ends of both shards
    weights = torch.randn(2, TOKENS, generator=random)
    exact = whole.double().requires_grad_()
    wanted = full(exact, labels, temperature)
    loss = (wanted[0] * weights[0]).sum()
    if entropy_grad:
        loss = loss + (wanted[1] * weights[1]).sum()
    loss.backward()

    size, rank = bench.layout.tensor, parallel_state.get_tensor_model_parallel_rank()
    mine = whole.chunk(size, dim=1)[rank].clone().requires_grad_()
    got = vocab_parallel_logprobs(
        mine,
        labels,
        vocab_size=VOCAB,
        group=parallel_state.get_tensor_model_parallel_group(),
        temperature=temperature,
        chunk_tokens=chunk,
        with_entropy_grad=entropy_grad,
    )
    assert got[1].requires_grad == entropy_grad
    loss = (got[0] * weights[0]).sum()
    if entropy_grad:
        loss = loss + (got[1] * weights[1]).sum()
    loss.backward()
    bound = 1e-6 + 4e-7 * scale / temperature
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=0, atol=bound)
    assert exact.grad is not None and mine.grad is not None
    wanted_grad = exact.grad.chunk(size, dim=1)[rank]
    bound = 1e-5 + (1e-6 * scale / temperature if entropy_grad else 0.0)
    torch.testing.assert_close(mine.grad.double(), wanted_grad, rtol=0, atol=bound)
    assert torch.equal(mine.detach(), whole.chunk(size, dim=1)[rank]), "the logits were changed"
    first = rank * PADDED // size
    assert not mine.grad[:, max(VOCAB - first, 0) :].any(), "padding columns got a gradient"


@on_ranks(TP2)
def test_a_rank_with_only_padding_columns(bench: Workbench) -> None:
    """A vocabulary smaller than one shard: the second rank owns no column at all."""
    from megatron.core import parallel_state

    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    random = torch.Generator().manual_seed(8)
    whole = torch.randn(5, 8, generator=random)
    labels = torch.tensor([0, 1, 2, 2, 1])
    rank = parallel_state.get_tensor_model_parallel_rank()
    mine = whole.chunk(2, dim=1)[rank].clone().requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    logprobs, _ = vocab_parallel_logprobs(mine, labels, vocab_size=3, group=group)
    wanted = torch.log_softmax(whole[:, :3].double(), dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs.detach().double(), wanted, rtol=0, atol=1e-6)
    logprobs.sum().backward()
    assert mine.grad is not None and (rank == 0 or not mine.grad.any())
