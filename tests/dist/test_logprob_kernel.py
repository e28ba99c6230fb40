"""vocab_parallel_logprobs against float64 math over the full vocabulary: values and gradients.

Not exercised here: CUDA.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import TP1, TP2, on_ranks
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

VOCAB, TOKENS = 101, 37


def full(logits: Tensor, labels: Tensor, temperature: float, vocab: int) -> tuple[Tensor, Tensor]:
    """(log-prob of the label, entropy) in the dtype of `logits`, from its first `vocab` columns."""
    log_p = torch.log_softmax(logits[:, :vocab] / temperature, dim=1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)


def group_and_rank() -> tuple[Any, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


@on_ranks(TP1, TP2, temperature=[1.0, 0.7], entropy_grad=[False, True])
def test_against_float64(bench: Workbench, temperature: float, entropy_grad: bool) -> None:
    """Small logits and logits up to +-80, in chunks of 8 tokens (4 rows at a time) and in one,
    with and without reuse of the logits, fp32 and bf16."""
    for scale, chunk, reuse, dtype in itertools.product(
        (1.0, 80.0), (8, 4096), (False, True), (torch.float32, torch.bfloat16)
    ):
        check(bench, scale, temperature, chunk, entropy_grad, reuse, dtype)


def check(
    bench: Workbench,
    scale: float,
    temperature: float,
    chunk: int,
    entropy_grad: bool,
    reuse: bool,
    dtype: torch.dtype,
    vocab: int = VOCAB,
    tokens: int = TOKENS,
) -> None:
    """Values within 1e-6, relative where they are above 1 (a log-prob of -200 has an fp32 spacing
    of 1.5e-5). Gradients, of size 1, within 1e-5, or half a bf16 step where they are stored so.
    Padding columns hold huge values that must not count."""
    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    padded = vocab + 3
    random = torch.Generator().manual_seed(7)
    whole = torch.empty(tokens, padded).uniform_(-scale, scale, generator=random)
    whole[:, vocab:] = 1e4
    whole = whole.to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=random)
    labels[:4] = torch.tensor(
        [0, padded // 2 - 1, padded // 2, vocab - 1]
    )  # the ends of both shards
    labels[4] = whole[4, :vocab].argmax()  # at +-80 a log-prob of almost 0
    weights = torch.randn(2, tokens, generator=random)
    exact = whole.double().requires_grad_()
    wanted = full(exact, labels, temperature, vocab)
    loss = (wanted[0] * weights[0]).sum()
    if entropy_grad:
        loss = loss + (wanted[1] * weights[1]).sum()
    loss.backward()

    group, rank = group_and_rank()
    size = bench.layout.tensor
    mine = whole.chunk(size, dim=1)[rank].clone().requires_grad_()
    got = vocab_parallel_logprobs(
        mine,
        labels,
        vocab_size=vocab,
        group=group,
        temperature=temperature,
        chunk_tokens=chunk,
        with_entropy_grad=entropy_grad,
        reuse_logits=reuse,
    )
    assert torch.equal(mine.detach(), whole.chunk(size, dim=1)[rank]), "the logits were changed"
    assert got[1].requires_grad == entropy_grad
    loss = (got[0] * weights[0]).sum()
    if entropy_grad:
        loss = loss + (got[1] * weights[1]).sum()
    loss.backward()
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        error = (ours.detach() - theirs.detach()).abs() / theirs.detach().abs().clamp(min=1)
        assert error.max() <= 1e-6, f"scale {scale}: off by {error.max():.1e}"
    assert exact.grad is not None and mine.grad is not None
    grad, wanted_grad = mine.grad, exact.grad.chunk(size, dim=1)[rank]
    half_step = 2**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=half_step, atol=1e-5)
    kept = torch.equal(mine.detach(), whole.chunk(size, dim=1)[rank])
    assert kept != reuse, "the logits were changed" if not kept else "the logits were not reused"
    first = rank * padded // size
    assert not grad[:, max(vocab - first, 0) :].any(), "padding columns got a gradient"


@on_ranks(TP1, TP2)
def test_a_large_vocabulary(bench: Workbench) -> None:
    """A sum has as many terms as in real models."""
    for dtype in (torch.float32, torch.bfloat16):
        check(bench, 10.0, 1.0, 4, True, True, dtype, vocab=151_937, tokens=7)


@on_ranks(TP2)
def test_a_rank_with_only_padding_columns(bench: Workbench) -> None:
    """A vocabulary smaller than one shard: the second rank owns no column at all."""
    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    random = torch.Generator().manual_seed(8)
    whole = torch.randn(5, 8, generator=random)
    labels = torch.tensor([0, 1, 2, 2, 1])
    group, rank = group_and_rank()
    mine = whole.chunk(2, dim=1)[rank].clone().requires_grad_()
    logprobs, _ = vocab_parallel_logprobs(mine, labels, vocab_size=3, group=group)
    wanted = torch.log_softmax(whole[:, :3].double(), dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs.detach().double(), wanted, rtol=0, atol=1e-6)
    logprobs.sum().backward()
    assert mine.grad is not None and (rank == 0 or not mine.grad.any())


@on_ranks(TP1)
def test_reused_logits_that_others_need_are_an_error(bench: Workbench) -> None:
    """Autograd notices: whoever saved the logits before gets an error, not a wrong gradient."""
    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    random = torch.Generator().manual_seed(9)
    logits = torch.randn(6, VOCAB, generator=random, requires_grad=True) * 2.0
    labels = torch.randint(0, VOCAB, (6,), generator=random)
    squares = logits.square().sum()  # saves the logits
    logprobs, _ = vocab_parallel_logprobs(
        logits, labels, vocab_size=VOCAB, group=group_and_rank()[0], reuse_logits=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logprobs.sum() + squares).backward()


@on_ranks(TP1, dtype=["float32", "bfloat16"], entropy_grad=[False, True])
def test_peak_memory(bench: Workbench, dtype: str, entropy_grad: bool) -> None:
    """Forward and backward together allocate at most 1.15 of one fp32 chunk beyond the logits:
    chunk by chunk and with one chunk for all of them, in a CPU's small blocks and in CUDA's."""
    from benchmarks.common.memory import peak_bytes
    from sfpo_megatron.mcore import logprobs as kernel

    tokens, columns = 256, 8192
    random = torch.Generator().manual_seed(10)
    logits = torch.randn(tokens, columns, generator=random).to(getattr(torch, dtype))
    labels = torch.randint(0, columns, (tokens,), generator=random)
    group = group_and_rank()[0]

    def both_ways(chunk: int) -> None:
        logprobs, entropy = kernel.vocab_parallel_logprobs(
            logits.requires_grad_(),
            labels,
            vocab_size=columns,
            group=group,
            chunk_tokens=chunk,
            with_entropy_grad=entropy_grad,
            reuse_logits=True,
        )
        torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)

    for chunk, block in itertools.product((64, tokens), (2**20, 2**40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "_CPU_BLOCK_BYTES", block)
            beyond = peak_bytes(partial(both_ways, chunk), torch.device("cpu"))
        chunks = beyond / (4 * chunk * columns)
        bench.figures[f"chunks_of_{chunk}_block_{block}"] = chunks
        assert chunks <= 1.15, f"{chunks:.2f} chunks of {chunk} tokens in blocks of {block} bytes"
