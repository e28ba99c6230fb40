"""Calls a loss or an advantage, built in or a user's own alike, and checks what it gives.

A PluginError names the function, what it gave and what was expected of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.host.unwinding import failures
from sfpo_megatron.objectives.surrogate import PolicyLoss, PolicyTokens, Statistics
from sfpo_megatron.plugins import ADVANTAGE, LOSS, Foreign, Kind, PluginError

Advantage = Callable[[Tensor, int, ObjectiveConfig], Tensor]
"""(rewards [N], group_size, config) -> [N]: `plugins.ADVANTAGE`."""


def checked_loss(
    function: PolicyLoss, tokens: PolicyTokens, config: ObjectiveConfig, taken: frozenset[str]
) -> tuple[Tensor, Statistics]:
    """(token losses [T], statistics [T] by name), both 0 outside the mask. `taken`: names that a
    statistic may not have."""
    with _named(LOSS, config.loss):
        given = function(tokens, config)
    losses, statistics = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not isinstance(losses, Tensor) or not isinstance(statistics, Mapping):
        raise _wrong(
            LOSS,
            config.loss,
            f"gave {_what(given)}",
            "a tensor of token losses [T], or a pair of that and a dict of statistics",
            "return one of these",
        )
    mask = tokens.loss_mask
    if losses.shape != mask.shape:
        raise _wrong(
            LOSS,
            config.loss,
            f"gave losses of shape {tuple(losses.shape)}",
            f"one a token, {tuple(mask.shape)}",
            "return them unreduced: mask and aggregation come after it",
        )
    for name, values in statistics.items():
        _check_statistic(name, values, mask, config.loss, taken)
    in_order = sorted(statistics)  # a dict's own order may differ between ranks
    return torch.where(mask, losses, 0.0), {
        name: torch.where(mask, statistics[name].detach(), 0) for name in in_order
    }


def no_gradient(loss: str) -> PluginError:
    """A loss that nothing can be learned from; Megatron's backward would not say why."""
    return _wrong(
        LOSS,
        loss,
        "gave losses without a gradient",
        "losses that depend on tokens.logprobs or tokens.ratio",
        "detach neither, and compute outside torch.no_grad()",
    )


def checked_advantages(
    function: Advantage, rewards: Tensor, group_size: int, config: ObjectiveConfig
) -> Tensor:
    """[N] float32, each of them finite."""
    with _named(ADVANTAGE, config.advantage):
        given = function(rewards, group_size, config)
    fix = "return one finite advantage a rollout, in the order of the rewards"
    expected = f"a tensor of shape {tuple(rewards.shape)}"
    if not isinstance(given, Tensor):
        raise _wrong(ADVANTAGE, config.advantage, f"gave {_what(given)}", expected, fix)
    if given.shape != rewards.shape:
        found = f"gave a shape {tuple(given.shape)}"
        raise _wrong(ADVANTAGE, config.advantage, found, expected, fix)
    advantages = given.detach().float()
    broken = (~advantages.isfinite()).nonzero().flatten().tolist()
    if broken:
        first = broken[0]
        found = (
            f"gave {advantages[first].item()} for rollout {first} (reward {rewards[first].item():g}"
            f", {len(broken)} of {advantages.numel()} like it)"
        )
        raise _wrong(ADVANTAGE, config.advantage, found, "finite numbers", fix)
    return advantages


def _check_statistic(
    name: Foreign, values: Foreign, mask: Tensor, loss: str, taken: frozenset[str]
) -> None:
    expected = f"a name of text and a tensor of one value a token, {tuple(mask.shape)}"
    if not isinstance(name, str) or not name:
        raise _wrong(LOSS, loss, f"named a statistic {name!r}", expected, "name it by a str")
    if name in taken:
        raise _wrong(
            LOSS,
            loss,
            f"named a statistic {name!r}, which every pass logs already",
            f"another name than {', '.join(sorted(taken))}",
            "rename it",
        )
    if not isinstance(values, Tensor):
        found = f"gave {_what(values)} as statistic {name!r}"
        raise _wrong(LOSS, loss, found, expected, "give a tensor [T]")
    if values.shape != mask.shape or values.is_complex():
        found = f"gave statistic {name!r} of shape {tuple(values.shape)}, {values.dtype}"
        raise _wrong(LOSS, loss, found, expected, "give it token by token: its mean is logged")


@contextmanager
def _named(kind: Kind, name: str) -> Iterator[None]:
    """An exception of a user's function says whose it is; the rank adds itself and the traceback
    (launcher/rank.py)."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise  # that there is no room says nothing about the function
    except failures() as error:  # whatever a user's function raises
        found = f"raised {type(error).__name__}: {error}"
        raise _wrong(kind, name, found, kind.form, "correct it") from error


def _wrong(kind: Kind, name: str, what: str, expected: str, fix: str) -> PluginError:
    return PluginError(kind.key, found=f"{name}, which {what}", expected=expected, fix=fix)


def _what(given: Foreign) -> str:
    if isinstance(given, tuple | list):
        return f"a {type(given).__name__} of {len(given)}"
    return "None" if given is None else f"a {type(given).__name__}"
