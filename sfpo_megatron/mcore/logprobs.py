"""Log-probs and exact entropy from vocab-parallel logits, without gathering the vocabulary.

Each tensor-parallel rank reduces its own columns, chunk by chunk along T, to four numbers a token
(max, sum of exp, sum of exp * logit, target logit); two all-reduces of [T] rows join them. Nothing
of size [T, V] is kept for the backward pass: the probabilities are rebuilt from the logits, which
are the model's output anyway, and two [T] vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [T, V/TP]
        labels: Tensor,  # [T] int64
        vocab_size: int,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup,
        with_entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        width = logits.shape[1]
        first = dist.get_rank(group) * width
        columns = min(max(vocab_size - first, 0), width)  # what lies beyond is vocabulary padding
        local = labels - first
        owned = (local >= 0) & (local < columns)
        local = torch.where(owned, local, 0)
        size = logits.shape[0]
        peak = logits.new_full((size,), torch.finfo(torch.float32).min, dtype=torch.float32)
        # rows: sum of exp, sum of exp * logit, target logit
        sums = logits.new_zeros((3, size), dtype=torch.float32)
        for part in _chunks(size, chunk):
            if columns == 0:
                break
            z = _scaled(logits[part, :columns], temperature)
            sums[2, part] = z.gather(1, local[part, None]).squeeze(1) * owned[part]
            peak[part] = z.amax(dim=1)
            weights = (z - peak[part, None]).exp_()
            sums[0, part] = weights.sum(dim=1)
            sums[1, part] = weights.mul_(z).sum(dim=1)
        # Same two collectives on every rank of the tensor-parallel group, in this order.
        highest = peak.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        sums[:2] *= (peak - highest).exp()
        dist.all_reduce(sums, group=group)
        logsumexp = highest + sums[0].log()
        entropy = logsumexp - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, owned, logsumexp, entropy)
        ctx.settings = (columns, temperature, chunk, with_entropy_grad)
        return sums[2] - logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob / dz_j = [j is the label] - p_j;  d H / dz_j = -p_j (log p_j + H)."""
        grad_logprobs, grad_entropy = grads
        logits, local, owned, logsumexp, entropy = ctx.saved_tensors
        columns, temperature, chunk, with_entropy_grad = ctx.settings
        out = torch.zeros_like(logits)
        for part in _chunks(logits.shape[0], chunk):
            if columns == 0:
                break
            log_p = _scaled(logits[part, :columns], temperature).sub_(logsumexp[part, None])
            p = log_p.exp()
            grad = p * -grad_logprobs[part, None]
            if with_entropy_grad:
                grad -= p * (log_p + entropy[part, None]) * grad_entropy[part, None]
            grad.scatter_add_(
                1, local[part, None], (grad_logprobs[part] * owned[part]).unsqueeze(1)
            )
            out[part, :columns] = grad.div_(temperature).to(out.dtype)
        return out, None, None, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature as a fresh fp32 tensor: of fp32 logits, `.float()` is the same storage,
    and an in-place operation on it would change the saved logits under the backward pass."""
    return logits.to(torch.float32, copy=True).div_(temperature)


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-prob of each label, exact entropy of each position), fp32, nats.

    logits: [T, V/TP], this rank's columns, padding last; labels: [T] int64. `vocab_size` is the
    unpadded vocabulary. Entropy carries no gradient unless `with_entropy_grad`. Collective over
    `group`, forward only: two all-reduces, whatever the number of chunks.
    """
    logprobs, entropy = _VocabParallelLogProbs.apply(
        logits, labels, vocab_size, temperature, chunk_tokens, group, with_entropy_grad
    )
    return logprobs, entropy if with_entropy_grad else entropy.detach()
