"""Expert tensors in few steps of Python: how vLLM's loaders took each is noted once and replayed.

A layer of a mixture of experts has hundreds of tensors. On the way to its parameter each goes
through AutoWeightsLoader, `RoutedExperts.load_weights`, and vLLM's layerwise reload, which calls
the weight loader once to count elements and again when the layer is complete. All but that second
call only makes a list entry, the same in every update but for the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor

_TENSOR = "loaded_weight"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the layerwise reload lists for one tensor."""

    layer: torch.nn.Module
    param: str
    call: BoundArguments
    num_elements: int


class Replay:
    """Notes entries in one update and makes them in later ones. The last tensor of each layer is
    never noted, for vLLM empties the list then: it goes vLLM's way and completes the layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        self._layers = {m.layer_name: m for m in model.modules() if isinstance(m, RoutedExperts)}
        self._entries: dict[str, _Entry] = {}

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield those tensors that vLLM has to load itself; it may be asked for the next one only
        when it has taken the last, else nothing is noted."""
        for name, tensor in tensors:
            if self._replays(name, tensor):
                continue
            layer = self._layers.get(name.rpartition(".experts.")[0] + ".experts")
            before = _progress(layer)
            yield name, tensor
            if layer is not None:
                self._note(name, tensor, layer, before)

    def forget(self) -> None:
        """Let vLLM load every tensor of the next update itself; that notes them again."""
        self._entries.clear()

    def _replays(self, name: str, tensor: Tensor) -> bool:
        entry = self._entries.get(name)
        if entry is None:
            return False
        info = _info(entry.layer)
        if not info.can_load():
            return False
        arguments = type(entry.call.arguments)(entry.call.arguments)
        arguments[_TENSOR] = tensor
        info.loaded_weights.append((entry.param, BoundArguments(entry.call.signature, arguments)))
        info.load_numel += entry.num_elements
        return True

    def _note(
        self, name: str, tensor: Tensor, layer: torch.nn.Module, before: tuple[int, int]
    ) -> None:
        """Keep what `tensor` has added to its layer's list, if that was one entry with itself."""
        num_entries, num_elements = before
        info = _info(layer)
        if len(info.loaded_weights) != num_entries + 1:
            return
        param, call = info.loaded_weights[-1]
        listed = call.arguments.get(_TENSOR)
        if not isinstance(listed, Tensor) or listed.shape != tensor.shape:
            return
        if (listed.data_ptr(), listed.stride()) != (tensor.data_ptr(), tensor.stride()):
            return
        arguments = type(call.arguments)(call.arguments)
        arguments[_TENSOR] = None
        self._entries[name] = _Entry(
            layer=layer,
            param=param,
            call=BoundArguments(call.signature, arguments),
            num_elements=info.load_numel - num_elements,
        )


def _progress(layer: torch.nn.Module | None) -> tuple[int, int]:
    """Entries of the layer's list, and the elements they stand for."""
    if layer is None:
        return 0, 0
    info = _info(layer)
    return len(info.loaded_weights), info.load_numel


def _info(layer: torch.nn.Module) -> Any:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)
