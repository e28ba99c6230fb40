"""The gradient of one saved batch in float64, on a transformers model: what every split must give.

Made in the pytest process beside the other references.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from plain_sfpo import Settings, advantages, minibatch_loss, names_in_file, token_logprobs
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(kw_only=True, frozen=True)
class ExactGradients:
    """Gradients of the whole batch as one minibatch."""

    gradient: dict[str, Tensor]
    """Gradients by Hugging Face name, float64."""
    old_logprobs: Tensor  # [sum R] float32
    response_mask: Tensor  # [sum R] bool
    loss: float

    def assert_equal(self, found: Mapping[str, Tensor]) -> None:
        """The same names, none of zeros, each within 1e-5 of its largest element: what fp32 adds up
        to."""
        assert found.keys() == self.gradient.keys()
        for name, gradient in self.gradient.items():
            bound = 1e-5 * gradient.abs().max()
            worst = (found[name].double() - gradient).abs().max()
            assert gradient.abs().max() > 0 and worst < bound, (name, float(worst), float(bound))


@torch.no_grad()
def _old_logprobs(model: torch.nn.Module, rows: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Log-probs of each row's response, moved by +-0.05 or +-0.4: half of the ratios are beyond a
    clip of 0.2, and none is so near to it that rounding decides."""
    random = torch.Generator().manual_seed(5)
    found = []
    for tokens, prompt in rows:
        logprobs = token_logprobs(model, tokens, prompt)[0]
        pick = torch.randint(0, 4, logprobs.shape, generator=random)
        found.append((logprobs + torch.tensor([-0.4, -0.05, 0.05, 0.4])[pick]).float())
    return found


def save(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    directory: Path,
    name: str,
    *,
    group_size: int,
    entropy_coef: float,
    mask: Tensor | None = None,
) -> None:
    """Write the gradients of `batch` (references.make_batch) by the plain trainer's loss, over all
    response tokens or those of `mask` [sum R]."""
    model = copy.deepcopy(model).double()
    lengths = (batch["prompt_lengths"] + batch["response_lengths"]).tolist()
    tokens, prompts = batch["token_ids"].split(lengths), batch["prompt_lengths"].tolist()
    old = _old_logprobs(model, list(zip(tokens, prompts, strict=True)))
    rows = list(zip(tokens, prompts, advantages(batch["rewards"], group_size), old, strict=True))
    settings = Settings(
        k=0, alpha=0.0, minibatches=1, group_size=group_size, lr=0.0, weight_decay=0.0,
        clip_grad=0.0, clip=0.2, entropy_coef=entropy_coef, eps=1.0,
    )  # fmt: skip
    if mask is None:
        mask = torch.ones(int(batch["response_lengths"].sum()), dtype=torch.bool)
    loss = minibatch_loss(model, rows, settings, mask.split(batch["response_lengths"].tolist()))
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    tensors = {f"gradient.{n}": grad for n, grad in names_in_file(grads).items()}
    file = directory / f"{name}.gradients.safetensors"
    tensors |= {"old_logprobs": torch.cat(old), "response_mask": mask, "loss": loss.detach()}
    save_file(tensors, file)


def save_next_token(
    model: torch.nn.Module, batch: dict[str, Tensor], directory: Path, name: str, mask: Tensor
) -> None:
    """Write transformers' own loss and its gradient: one padded batch, labels of -100 outside of
    `mask` [sum R]."""
    model = copy.deepcopy(model).double()
    prompts, responses = batch["prompt_lengths"].tolist(), batch["response_lengths"].tolist()
    rows = batch["token_ids"].split([p + r for p, r in zip(prompts, responses, strict=True)])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attended, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    masks = mask.split(responses)
    for i, (row, prompt, learned) in enumerate(zip(rows, prompts, masks, strict=True)):
        attended[i, : len(row)] = 1
        labels[i, prompt : len(row)] = torch.where(learned, row[prompt:], -100)
    loss = model(input_ids=ids, attention_mask=attended, labels=labels).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    tensors = {f"gradient.{n}": grad for n, grad in names_in_file(grads).items()}
    tensors |= {"response_mask": mask, "loss": loss.detach()}
    save_file(tensors, directory / f"{name}.next-token.safetensors")


def load_next_token(directory: Path, name: str) -> ExactGradients:
    tensors = load_file(directory / f"{name}.next-token.safetensors")
    loss, mask = tensors.pop("loss"), tensors.pop("response_mask")
    gradient = {key.removeprefix("gradient."): tensor for key, tensor in tensors.items()}
    nothing = torch.zeros(mask.numel())
    return ExactGradients(
        gradient=gradient, old_logprobs=nothing, response_mask=mask, loss=loss.item()
    )


def load(directory: Path, name: str) -> ExactGradients:
    tensors = load_file(directory / f"{name}.gradients.safetensors")
    loss, old, mask = (tensors.pop(key) for key in ("loss", "old_logprobs", "response_mask"))
    gradient = {key.removeprefix("gradient."): tensor for key, tensor in tensors.items()}
    return ExactGradients(gradient=gradient, old_logprobs=old, response_mask=mask, loss=loss.item())
