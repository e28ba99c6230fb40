"""Mixture of experts: does the layout fit the model's experts, and is there a way to train them?"""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.moe import MoEShape
from sfpo_megatron.families.shape import ModelShape


def expert_layout(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Expert ranks are taken from the data x tensor x context ranks of a pipeline stage; how often
    they fit in is the expert-data-parallel size."""
    parallel = config.parallel
    data = parallel.data or (world_size or 0) // parallel.model_size
    stage = data * parallel.tensor * parallel.context
    if stage % (parallel.expert * parallel.expert_tensor):
        yield Problem(
            "parallel.expert",
            f"{parallel.expert} (x expert_tensor {parallel.expert_tensor})",
            f"a divisor of data x tensor x context ({stage})",
            "raise parallel.data or lower parallel.expert: experts are spread over these ranks",
        )


def experts_of_model(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """Does the layout fit the model's experts, or their absence?"""
    parallel, moe = config.parallel, shape.moe
    if moe is None:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                yield Problem(
                    f"parallel.{name}",
                    f"{getattr(parallel, name)} with a {shape.family} model",
                    "1",
                    "set it to 1: the model has no experts",
                )
        return
    yield from _divisible(config, moe)
    yield from _with_tensor_parallel(config)
    yield from _with_loss_scale(config)
    if on_cpu and parallel.expert_tensor > 1:
        yield Problem(
            "parallel.expert_tensor",
            str(parallel.expert_tensor),
            "1 on CPU",
            "set it to 1: gloo cannot gather the differing numbers of tokens of its ranks",
            "error_when_training",
        )
    yield from _equal_numbers_of_tokens(config)
    for kind in ("sinkhorn", "quantile_balancing"):  # the second: megatron-core 0.19
        if kind in str(config.megatron.transformer.get("moe_router_load_balancing_type")):
            yield Problem(
                "megatron.transformer.moe_router_load_balancing_type",
                kind,
                "none, aux_loss, seq_aux_loss or global_aux_loss",
                "choose another: the engine would route tokens otherwise",
            )


def _divisible(config: RunConfig, moe: MoEShape) -> Iterator[Problem]:
    for key, size, name, total in (
        ("parallel.expert", config.parallel.expert, "experts", moe.num_experts),
        ("parallel.expert_tensor", config.parallel.expert_tensor, "expert size", moe.ffn_size),
    ):
        if total % size:
            yield Problem(
                key, str(size), f"a divisor of the model's {name} ({total})", "choose another size"
            )


def _equal_numbers_of_tokens(config: RunConfig) -> Iterator[Problem]:
    """Dispatchers that take as many tokens from every expert-parallel rank: the one that gathers
    (`MoEAllGatherTokenDispatcher`), and HybridEP's unless it pads. Two ranks' packs are unequal."""
    given, expert = config.megatron.transformer, config.parallel.expert
    kind, pads = given.get("moe_token_dispatcher_type"), "moe_hybridep_pad_uneven_dispatch_inputs"
    is_hybrid = kind == "flex" and given.get("moe_flex_dispatcher_backend") == "hybridep"
    if expert > 1 and (kind == "allgather" or (is_hybrid and not given.get(pads))):
        where = f"{kind} over hybridep" if is_hybrid else kind
        instead = f", or set {pads}: true (megatron-core 0.19)" if is_hybrid else ""
        yield Problem(
            "megatron.transformer.moe_token_dispatcher_type",
            f"{where} with parallel.expert {expert}",
            "alltoall: packs of two ranks have unequal numbers of tokens, and it wants equal ones",
            f"remove it: alltoall is the default{instead}",
        )


def _with_loss_scale(config: RunConfig) -> Iterator[Problem]:
    """Under expert parallelism experts have an optimizer of their own, whose dynamic loss scale
    moves by its own gradients, while the loss is multiplied by the other optimizer's."""
    expert = config.parallel.expert
    constant = config.megatron.optimizer.get("loss_scale")
    if expert > 1 and config.model.dtype == "float16" and not constant:
        yield Problem(
            "model.dtype",
            f"float16 with parallel.expert {expert}",
            "bfloat16 or float32: the dynamic loss scale of the experts' optimizer would part from "
            "that of the others",
            "set model.dtype: bfloat16, or a constant megatron.optimizer.loss_scale, or "
            "parallel.expert: 1",
        )


def _with_tensor_parallel(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.tensor == 1:
        return
    if not parallel.sequence:
        yield Problem(
            "parallel.sequence",
            f"false with experts and tensor {parallel.tensor}",
            "true",
            "set it: Megatron trains experts under tensor parallelism with sequence parallelism "
            "only",
        )
    if parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        # Each tensor-parallel rank then has all experts and a part of the tokens, and Megatron adds
        # gradients up over data-parallel ranks only (`allreduce` is True without expert parallel).
        yield Problem(
            "parallel.expert_tensor",
            f"{parallel.expert_tensor} with expert 1 and tensor {parallel.tensor}",
            f"{parallel.tensor}, or parallel.expert above 1",
            f"set parallel.expert={parallel.tensor}: without it the gradients of experts would "
            "miss the other tensor-parallel ranks' tokens",
        )
