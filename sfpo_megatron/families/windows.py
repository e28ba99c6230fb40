"""Sliding windows: which layers attend within config.json's `sliding_window`, family by family.

Each function takes a config.json and returns a bool a layer, or nothing where no layer has a
window. No torch.
"""

from __future__ import annotations

from sfpo_megatron.families.hf_config import HFConfig


def no_layer(config: HFConfig) -> tuple[bool, ...]:
    """The family has no windows, whatever config.json says."""
    return ()


def every_layer(config: HFConfig) -> tuple[bool, ...]:
    """All of them, where there is a window."""
    return (True,) * int(config["num_hidden_layers"]) if config.get("sliding_window") else ()


def every_layer_if_used(config: HFConfig) -> tuple[bool, ...]:
    """All of them, where `use_sliding_window` says so too."""
    return every_layer(config) if config.get("use_sliding_window") else ()


def last_layers_if_used(config: HFConfig) -> tuple[bool, ...]:
    """Those from `max_window_layers` on, or those that `layer_types` names."""
    if not every_layer_if_used(config):
        return ()
    num_layers, types = int(config["num_hidden_layers"]), config.get("layer_types")
    first = config.get("max_window_layers", num_layers)
    sliding = [layer >= first for layer in range(num_layers)]
    if isinstance(types, list):
        sliding = [kind == "sliding_attention" for kind in types]
    return tuple(sliding) if any(sliding) else ()
