"""Modes of Megatron's optimizer whose main params SFPO could not edit, named before all else:
what mcore/shards/refused.py says of the optimizer that was built. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.types import Json

OPTIMIZERS: Mapping[str, int] = {"adam": 2, "sgd": 1}
"""Megatron's name of an optimizer that SFPO knows -> moments that it keeps of each param."""
REFUSED = {
    ("transformer", "fp8_param"): "model params are quantized",
    ("transformer", "fp4_param"): "model params are quantized",
    ("ddp", "use_megatron_fsdp"): "its param buffers are managed elsewhere",
    ("ddp", "use_custom_fsdp"): "its param buffers are managed elsewhere",
    ("ddp", "fp8_param_gather"): "model params are quantized",
    ("ddp", "fp4_param_gather"): "model params are quantized",
    ("optimizer", "use_layer_wise_distributed_optimizer"): "whole params are dealt to ranks, which "
    "its own step gathers",
    ("ddp", "reuse_grad_buf_for_mxfp8_param_ag"): "gathered params share storage with gradients",
    ("optimizer", "reuse_grad_buf_for_mxfp8_param_ag"): "gathered params share storage with "
    "gradients",
    ("optimizer", "overlap_param_gather_with_optimizer_step"): "the last fast step would gather "
    "what the reposition is about to overwrite",
}
"""Section and field -> why it may not be true."""


def optimizer_modes(config: RunConfig) -> Iterator[Problem]:
    """Whether the sections of `megatron` leave SFPO the fp32 main params."""
    megatron = config.megatron
    sections = {
        "transformer": megatron.transformer, "ddp": megatron.ddp, "optimizer": megatron.optimizer
    }  # fmt: skip
    for (section, name), why in REFUSED.items():
        if sections[section].get(name):
            yield _refused(f"{section}.{name}", sections[section][name], "false", why)
    given = config.megatron.optimizer
    if (kind := given.get("optimizer", "adam")) not in OPTIMIZERS:
        why = "what it keeps beside the main params is not known to SFPO"
        yield _refused("optimizer.optimizer", kind, " or ".join(OPTIMIZERS), why)
    dtype = given.get("main_params_dtype", "float32")
    if given.get("use_precision_aware_optimizer") and dtype != "float32":
        why = "lower precisions are scaled, and the scale changes with every edit"
        yield _refused("optimizer.main_params_dtype", dtype, "float32", why)


def _refused(name: str, found: Json, expected: str, why: str) -> Problem:
    return Problem(f"megatron.{name}", repr(found), f"{expected} with SFPO", f"remove it: {why}")
