"""SFPO written out on one process: a transformers model, torch's AdamW, the paper's formulas.

Independent of sfpo_megatron (no import of it): the second opinion of the training cases. One
sequence a forward, float64 sums, the reposition as theta_0 + alpha * (theta_K - theta_0), or of a
predicted trajectory, PrePO, in float64 with the optimizer state put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from made.prepo import predicted, undecided, weight_rms
from torch import Tensor


@dataclass(kw_only=True, frozen=True)
class Settings:
    k: int
    alpha: float
    minibatches: int
    group_size: int
    lr: float
    weight_decay: float
    clip_grad: float
    clip: float
    entropy_coef: float
    eps: float
    predicted: bool = False
    """Two real fast passes, from which k are predicted."""


def token_logprobs(model: torch.nn.Module, tokens: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [R] at the response tokens of one sequence [P + R]."""
    logits = model(tokens[None]).logits[0]
    every = torch.log_softmax(logits[prompt - 1 : -1], dim=-1)
    entropy = -(every.exp() * every).sum(dim=-1)
    return every.gather(1, tokens[prompt:, None])[:, 0], entropy


def advantages(rewards: Tensor, group_size: int) -> list[float]:
    """(r - mean) / (unbiased std + 1e-6) within each group."""
    result: list[float] = []
    for group in rewards.double().split(group_size):
        mean = group.sum() / group_size
        std = (((group - mean) ** 2).sum() / (group_size - 1)).sqrt()
        result += ((group - mean) / (std + 1e-6)).tolist()
    return result


def minibatch_loss(
    model: torch.nn.Module,
    rows: Sequence[tuple[Tensor, int, float, Tensor]],
    settings: Settings,
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over the response tokens (with `masks`, [R] bool of each row, over those alone) of
    -min(r A, clip(r, 1 - c, 1 + c) A) - coef * entropy."""
    clip = settings.clip
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, (tokens, prompt, advantage, old) in enumerate(rows):
        logprobs, entropy = token_logprobs(model, tokens, prompt)
        if masks is not None:
            chosen = masks[index]
            logprobs, entropy, old = logprobs[chosen], entropy[chosen], old[chosen]
        ratio = (logprobs - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        total = total - surrogate.double().sum() - settings.entropy_coef * entropy.double().sum()
        count += ratio.numel()
    return total / count


def train(
    model: torch.nn.Module, batches: Sequence[dict[str, Tensor]], settings: Settings
) -> tuple[list[list[list[list[float]]]], dict[str, Tensor]]:
    """((loss, gradient norm) [step][pass][minibatch], weights by Hugging Face name); nan are those
    whose prediction float32 leaves undecided in some step."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=settings.eps)

    def one_pass(parts: Sequence[Sequence[tuple[Tensor, int, float, Tensor]]]) -> list[list[float]]:
        losses = []
        for rows in parts:
            adam.zero_grad()
            loss = minibatch_loss(model, rows, settings)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, settings.clip_grad)
            adam.step()
            losses.append([loss.item(), norm.item()])
        return losses

    history = []
    open_ones = [torch.zeros_like(p, dtype=torch.bool) for p in params]
    for batch in batches:
        lengths = (batch["prompt_lengths"] + batch["response_lengths"]).tolist()
        tokens = batch["token_ids"].split(lengths)
        prompts = batch["prompt_lengths"].tolist()
        with torch.no_grad():
            old = [token_logprobs(model, t, p)[0] for t, p in zip(tokens, prompts, strict=True)]
        weights = advantages(batch["rewards"], settings.group_size)
        rows = list(zip(tokens, prompts, weights, old, strict=True))
        size = len(rows) // settings.minibatches
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        slow, state = [p.detach().clone() for p in params], deepcopy(adam.state_dict())
        if settings.predicted:
            losses = [one_pass(parts)]
            first = [p.detach().clone() for p in params]
            losses.append(one_pass(parts))
            for one, found in zip(open_ones, reposition(model, slow, first, settings), strict=True):
                one |= found
            adam.load_state_dict(state)
        else:
            losses = [one_pass(parts) for _ in range(settings.k)]
            with torch.no_grad():
                for param, start in zip(params, slow, strict=True):
                    param.copy_(start + settings.alpha * (param - start))
        losses.append(one_pass(parts))
        history.append(losses)
    named = zip(model.named_parameters(), open_ones, strict=True)
    return history, names_in_file({n: p.detach().masked_fill(o, torch.nan) for (n, p), o in named})


@torch.no_grad()
def reposition(
    model: torch.nn.Module, slow: Sequence[Tensor], first: Sequence[Tensor], settings: Settings
) -> list[Tensor]:
    """To where `settings.k` passes would have led; the model's weights are those after two. Which
    of each are `undecided`."""
    names = [name for name, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    left = (1 - settings.lr * settings.weight_decay) ** settings.minibatches
    kept = {name: left if param.dim() > 1 else 1.0 for name, param in params.items()}
    whole = {name: (a, b, params[name]) for name, a, b in zip(names, slow, first, strict=True)}
    moved = {name: kept[name] * a.double() - b.double() for name, (a, b, _) in whole.items()}
    rms = weight_rms(moved)
    marks = [undecided(moved[name], a, rms[name]) for name, (a, _, _) in whole.items()]
    for name, weights in whole.items():
        found = predicted(
            weights, decay=kept[name], horizon=settings.k, alpha=settings.alpha, rms=rms[name]
        )
        params[name].copy_(found)
    return marks


def names_in_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers stacks the experts of a layer in memory, gate above up; a file has them apart
    (under Qwen3-MoE's names; Mixtral is not trained here)."""
    result = {}
    for name, tensor in weights.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            result[name] = tensor.contiguous()
            continue
        for expert, of_expert in enumerate(tensor):
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            for part, matrix in zip(names, of_expert.chunk(len(names)), strict=True):
                result[f"{prefix}.{expert}.{part}.weight"] = matrix.contiguous()
    return result
