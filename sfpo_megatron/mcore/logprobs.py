"""Log-probs and exact entropy from vocab-parallel logits, without gathering the vocabulary.

With x the logits, m their maximum over the vocabulary, and d_j = (x_j - m) / temperature:

    log p_j = d_j - log sum_i exp(d_i)            H = log sum_i exp(d_i) - sum_j p_j d_j

Each tensor-parallel rank reduces its own columns, a few rows at a time, to four numbers a token
(maximum, sum of exp(d), sum of exp(d) d, the label's logit); two all-reduces of [T] rows join them.
The backward pass rebuilds the probabilities from the logits, which the output layer has made
anyway, and two [T] vectors:

    d log p_label / d x_j = ([j = label] - p_j) / temperature
    d H           / d x_j = -p_j (log p_j + H) / temperature

It writes this into the storage of the logits themselves where it may (`reuse_logits`), so that
beyond the logits no more than one fp32 buffer [chunk, V/TP] is ever allocated.

Subtracting m before anything is scaled or summed keeps every intermediate's rounding error relative
to d, not to x: fp32 logits of +-80 cost no more digits than those of +-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

_CPU_BLOCK_BYTES = 2**20
"""Size of one fp32 buffer: a block is swept several times and should stay in a core's cache."""


@dataclass(kw_only=True, frozen=True, slots=True)
class _Columns:
    """This rank's columns of the vocabulary, and the blocks in which they are swept."""

    width: int
    """Number of columns, without the padding behind them."""
    temperature: float
    block: int
    """Number of rows at a time."""

    def blocks(self, num_rows: int) -> Iterator[slice]:
        if self.width:
            for start in range(0, num_rows, self.block):
                yield slice(start, min(start + self.block, num_rows))

    def shifted(self, logits: Tensor, peak: Tensor, *, in_place: bool = False) -> Tensor:
        """d in fp32: in a buffer of its own or, for fp32 logits, in place of them."""
        d, peak = logits[:, : self.width], peak[:, None]
        if d.dtype != torch.float32:
            d = d.float().sub_(peak)  # a CPU subtracts mixed dtypes 15 times more slowly
        else:
            d = d.sub_(peak) if in_place else d - peak
        return d if self.temperature == 1.0 else d.div_(self.temperature)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,  # [T, V/TP]
        local: Tensor,  # [T] int64: the label's column here, 0 where another rank owns it
        owned: Tensor,  # [T] bool
        columns: _Columns,
        group: dist.ProcessGroup,
        with_entropy_grad: bool,
        reuse_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        size, temperature = logits.shape[0], columns.temperature
        peak = logits.new_full((size,), torch.finfo(torch.float32).min, dtype=torch.float32)
        # rows: sum of exp(d), sum of exp(d) * d, the label's logit
        sums = logits.new_zeros((3, size), dtype=torch.float32)
        for rows in columns.blocks(size):
            block = logits[rows]
            sums[2, rows] = block.gather(1, local[rows, None]).squeeze(1) * owned[rows]
            peak[rows] = block[:, : columns.width].amax(dim=1).float()
            d = columns.shifted(block, peak[rows])
            weights = d.exp()
            sums[0, rows] = weights.sum(dim=1)
            sums[1, rows] = d.mul_(weights).sum(dim=1)
            del d, weights  # or they would live on beside the next block's
        # Same two collectives on every rank of the tensor-parallel group, in this order.
        highest = peak.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shift = (peak - highest) / temperature  # from this rank's maximum to that of all
        sums[1] += shift * sums[0]
        sums[:2] *= shift.exp()
        dist.all_reduce(sums, group=group)
        log_total = sums[0].log()
        entropy = log_total - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, owned, highest, log_total, entropy)
        ctx.settings = (columns, with_entropy_grad, reuse_logits)
        return (sums[2] - highest) / temperature - log_total, entropy

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, owned, highest, log_total, entropy = ctx.saved_tensors
        columns, with_entropy_grad, reuse_logits = ctx.settings
        grad_logprobs, grad_entropy = (grad / columns.temperature for grad in grads)
        # Autograd has counted the write: whoever else saved these logits for a backward pass that
        # is still to come gets an error from it, not a wrong gradient.
        out = logits.detach() if reuse_logits else torch.empty_like(logits)
        in_place = reuse_logits and logits.dtype == torch.float32
        for rows in columns.blocks(logits.shape[0]):
            grad = columns.shifted(logits[rows].detach(), highest[rows], in_place=in_place)
            grad.sub_(log_total[rows, None])  # log p
            if with_entropy_grad:
                p = grad.exp()
                grad.add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
                grad.add_(grad_logprobs[rows, None]).mul_(p).neg_()
                del p  # or it would live on beside the next block's
            else:
                grad.exp_().mul_(-grad_logprobs[rows, None])
            at_label = (grad_logprobs[rows] * owned[rows]).unsqueeze(1)
            grad.scatter_add_(1, local[rows, None], at_label)
            if not in_place:
                out[rows, : columns.width] = grad
            del grad
        out[:, columns.width :] = 0
        return out, None, None, None, None, None, None


def _block_rows(chunk_tokens: int, width: int, device: torch.device) -> int:
    """Rows of a block: its two fp32 buffers together are as large as one of a chunk."""
    rows = chunk_tokens // 2
    if device.type == "cpu":
        rows = min(rows, _CPU_BLOCK_BYTES // (4 * max(width, 1)))
    return max(rows, 1)


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy_grad: bool = False,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """The log-prob of each label and the exact entropy of each position, fp32, nats.

    logits: [T, V/TP], this rank's columns, padding last; labels: [T] int64. `vocab_size` is the
    unpadded vocabulary. Entropy carries no gradient unless `with_entropy_grad`. Collective over
    `group`, forward only: two all-reduces, whatever the number of chunks.

    `reuse_logits`: the backward pass overwrites the logits with their gradient. For logits that
    nothing reads after it, such as Megatron's: its output layer saves its input, not its output.
    """
    first = dist.get_rank(group) * logits.shape[1]
    width = min(max(vocab_size - first, 0), logits.shape[1])  # beyond is vocabulary padding
    local = labels - first
    owned = (local >= 0) & (local < width)
    columns = _Columns(
        width=width,
        temperature=temperature,
        block=_block_rows(chunk_tokens, width, logits.device),
    )
    logprobs, entropy = _VocabParallelLogProbs.apply(
        logits,
        torch.where(owned, local, 0),
        owned,
        columns,
        group,
        with_entropy_grad,
        reuse_logits,
    )
    return logprobs, entropy if with_entropy_grad else entropy.detach()
